"""Requests that kill whatever works on them: they fail by name, everything beside them completes."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator

import openai
import pytest
from openai.types import Batch

from tests.faults.batches import (
    assert_each_answered_once,
    assert_nothing_left,
    line,
    numbered,
    results,
    submit,
    wait_until_done,
    wait_until_ended,
)
from tests.running_node import RunningNode, running_node

pytestmark = pytest.mark.timeout(180)

ITEMS = 300
LIMIT_S = 120.0
"""Each poison costs some ten restarts of an engine."""

ECHO = {
    "model": "echo",
    "engine": "echo",
    "replicas": 2,
    "max_running": 16,
    "options": {"faults": True},
}
QUEUE = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "chunk_items": 64, "drain_s": 5}
NODE = {"engine_restart_s": 0.05}


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """A node whose engines die when asked to."""
    with running_node(models=(ECHO,), queue=QUEUE, node=NODE) as running:
        yield running
    assert_nothing_left(running)


@pytest.fixture
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK."""
    return node.sdk(max_retries=8)


def poisoned(*places: int, count: int = ITEMS) -> list[str]:
    """Lines of which those at ``places`` kill the engine."""
    lines = numbered(count)
    for place in places:
        lines[place] = line(f"item-{place}", "[[echo:kill]] please")
    return lines


def assert_only_poison_failed(sdk: openai.OpenAI, batch: Batch, poison: set[int]) -> None:
    """Every other line has its own answer."""
    assert batch.status == "completed", batch.model_dump_json(indent=1)
    answered = Counter(row["custom_id"] for row in results(sdk, batch.output_file_id))
    assert answered == Counter(f"item-{n}" for n in range(ITEMS) if n not in poison)
    failed = results(sdk, batch.error_file_id)
    assert Counter(row["custom_id"] for row in failed) == Counter(f"item-{n}" for n in poison)
    for row in failed:
        error = row["response"]["body"]["error"]
        assert (error["code"], row["response"]["status_code"]) == ("engine_crashed", 503)
        assert "given up" in error["message"]


def test_one_poison_in_a_batch(sdk: openai.OpenAI) -> None:
    """It fails as engine_crashed; 299 others are answered."""
    batch = submit(sdk, poisoned(137))
    assert_only_poison_failed(sdk, wait_until_ended(sdk, batch.id, LIMIT_S), {137})


def test_three_poisons_in_two_chunks(sdk: openai.OpenAI) -> None:
    """Two of them in one chunk, which takes turns with the other chunk's."""
    batch = submit(sdk, poisoned(3, 40, 130))
    assert_only_poison_failed(sdk, wait_until_ended(sdk, batch.id, LIMIT_S), {3, 40, 130})


def test_poison_in_two_batches_at_once_and_a_third_without(sdk: openai.OpenAI) -> None:
    """Nobody is blamed for another's poison."""
    batches = [submit(sdk, lines) for lines in (poisoned(70), poisoned(200), poisoned())]
    ended = [wait_until_ended(sdk, batch.id, LIMIT_S) for batch in batches]
    assert_only_poison_failed(sdk, ended[0], {70})
    assert_only_poison_failed(sdk, ended[1], {200})
    assert_each_answered_once(sdk, ended[2], ITEMS)


def test_an_engine_error_is_an_answer(sdk: openai.OpenAI) -> None:
    """No retries, no bisecting: the engine said what it thinks of the request."""
    lines = numbered(ITEMS)
    lines[9] = line("item-9", "[[echo:error]]")
    lines[10] = line("item-10", "[[echo:bug]]")
    ended = wait_until_ended(sdk, submit(sdk, lines).id, LIMIT_S)
    failed = {row["custom_id"]: row for row in results(sdk, ended.error_file_id)}
    assert failed.keys() == {"item-9", "item-10"}
    codes = {row["response"]["body"]["error"]["code"] for row in failed.values()}
    assert codes == {"engine_error"}


def test_an_engine_killed_from_outside_is_blamed_on_nobody(
    node: RunningNode, sdk: openai.OpenAI
) -> None:
    """However often, as long as it is not each time the same item."""
    slow = [line(f"item-{n}", f"say {n}") for n in range(ITEMS)]
    slow[100] = line("item-100", "[[echo:sleep=1.5]]say 100")
    batch = submit(sdk, slow)
    wait_until_done(sdk, batch.id, 64)
    for pid in node.engine_pids():
        os.kill(pid, signal.SIGKILL)
    ended = wait_until_ended(sdk, batch.id, LIMIT_S)
    assert ended.status == "completed"
    assert ended.error_file_id is None
    assert len(results(sdk, ended.output_file_id)) == ITEMS
