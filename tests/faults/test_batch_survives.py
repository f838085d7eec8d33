"""A 2,000-line batch meets each kind of night: a part of vlmq is killed, paused, cut off or wiped.

Afterwards every line has exactly one answer, within the recovery limit, and no process is left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import openai
import pytest

from shared.process import parent_of
from tests.faults.batches import (
    RECOVERY_LIMIT_S,
    assert_each_answered_once,
    assert_nothing_left,
    done,
    numbered,
    submit,
    wait_until_done,
    wait_until_ended,
)
from tests.running_node import RunningNode, running_node, wait_for

ITEMS = 2_000

SLOW_ECHO = {
    "model": "echo",
    "engine": "echo",
    "replicas": 2,
    "max_running": 16,
    "options": {"delay_s": 0.05, "faults": True},
}
"""Two replicas of 16 at 50 ms: some 640 lines a second, so that there is a middle to break."""

FAST = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "chunk_items": 64, "drain_s": 5}


@pytest.fixture
def node() -> Iterator[RunningNode]:
    """A node of its own for each test."""
    with running_node(models=(SLOW_ECHO,), queue=FAST) as running:
        yield running
    assert running.process is not None
    assert_nothing_left(running)


@pytest.fixture
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, patient with a server that is away for a moment."""
    return node.sdk(max_retries=8)


def start_and_reach_the_middle(sdk: openai.OpenAI) -> str:
    """Submit the batch and wait until some of it is done, and far from all."""
    batch = submit(sdk, numbered(ITEMS))
    wait_until_done(sdk, batch.id, 200)
    assert done(sdk.batches.retrieve(batch.id)) < ITEMS
    return batch.id


def test_kill_9_of_a_batch_consumer_child(node: RunningNode, sdk: openai.OpenAI) -> None:
    """The chunk it held is done by another."""
    batch_id = start_and_reach_the_middle(sdk)
    os.kill(node.batch_children()[0], signal.SIGKILL)
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_kill_9_of_the_whole_batch_consumer(node: RunningNode, sdk: openai.OpenAI) -> None:
    """The node starts a new one, and no child of the old one stays."""
    batch_id = start_and_reach_the_middle(sdk)
    consumers = set(node.pids("workers.consumer batch"))
    [parent] = [pid for pid in consumers if parent_of(pid) not in consumers]
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: not consumers & set(node.pids()), "the old consumer's end", 15)
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_kill_9_of_an_engine(node: RunningNode, sdk: openai.OpenAI) -> None:
    """What was inside it is asked again; nobody is blamed."""
    batch_id = start_and_reach_the_middle(sdk)
    os.kill(node.engine_pids()[0], signal.SIGKILL)
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_kill_9_of_valkey(node: RunningNode, sdk: openai.OpenAI) -> None:
    """The node restarts it and its append-only file has everything."""
    batch_id = start_and_reach_the_middle(sdk)
    os.kill(node.redis_pid(), signal.SIGKILL)
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_a_consumer_paused_past_its_lease(node: RunningNode, sdk: openai.OpenAI) -> None:
    """Its chunk goes to another; when it wakes, what it computed is refused by its token."""
    batch_id = start_and_reach_the_middle(sdk)
    victim = node.batch_children()[0]
    os.kill(victim, signal.SIGSTOP)
    try:
        batch = wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S)
    finally:
        os.kill(victim, signal.SIGCONT)
    time.sleep(2)
    assert sdk.batches.retrieve(batch_id) == batch
    assert_each_answered_once(sdk, batch, ITEMS)


def test_a_wiped_valkey_is_rebuilt_from_shared_storage(
    node: RunningNode, sdk: openai.OpenAI
) -> None:
    """Committed shards are kept, the rest is computed again."""
    batch_id = start_and_reach_the_middle(sdk)
    node.stores.redis.flushall()
    with pytest.raises(openai.NotFoundError):
        sdk.batches.retrieve(batch_id)
    report = node.stores.rebuild()
    assert (report.batches, report.chunks_kept > 0) == (1, True)
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_sigterm_drains_and_the_next_start_goes_on(node: RunningNode, sdk: openai.OpenAI) -> None:
    """Stopping in good order in the middle loses nothing."""
    batch_id = start_and_reach_the_middle(sdk)
    assert node.stop() == 0
    assert_nothing_left(node)
    node.start()
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)


def test_kill_9_of_the_node_leaves_no_process_and_loses_nothing(
    node: RunningNode, sdk: openai.OpenAI
) -> None:
    """All its programs die with it; the next one goes on."""
    batch_id = start_and_reach_the_middle(sdk)
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    assert_nothing_left(node)
    node.start()
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch_id, RECOVERY_LIMIT_S), ITEMS)
