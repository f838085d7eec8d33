"""Models that enter and leave the registry while a node runs. Real nodes with the echo engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from shared.errors import QueueUnavailable
from tests.faults.batches import done, line, submit, wait_until_ended
from tests.fleets import (
    LIMIT_S,
    QUICK,
    ask,
    echo,
    replicas,
    states,
    story,
    traffic,
    wait_for_states,
)
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """A node without ``node.serve``: it serves whatever is linked."""
    with open_node() as running:
        yield running


def open_node(**sections: Any) -> Any:
    """A node whose configuration names no model; one is linked before it starts."""
    options = {"node": {**QUICK, "serve": []}, **sections}
    return running_node(models=({"model": "first", "engine": "echo"},), **options)


def link(node: RunningNode, name: str, **fields: Any) -> None:
    """Enter a model of the echo engine into the registry, as another program would."""
    node.stores.models.link(name, None, engine="echo", **fields)


def wait_until_served(node: RunningNode, name: str) -> None:
    """Wait until a node says that it has or can load a model."""
    wait_for(lambda: node.stores.presence.obtainable(name), f"{name}", LIMIT_S, node.story)


def first_answer(node: RunningNode, name: str) -> str | None:
    """Ask until the API has heard of the model: its view of the nodes may be half a second old."""
    answers: list[str | None] = []

    def answered() -> bool:
        try:
            answers.append(ask(node, name))
        except openai.InternalServerError as error:
            if error.code != "model_unavailable":
                raise
            return False
        return True

    wait_for(answered, f"an answer of {name}", LIMIT_S, node.story)
    return answers[0]


def is_ready(node: RunningNode, name: str) -> bool:
    """Whether a model's one replica is ready, as far as Redis can be asked."""
    try:
        return states(node, name) == ["ready"]
    except QueueUnavailable:
        return False


def batch_of(node: RunningNode, model: str, count: int = 20) -> Any:
    """Submit a small batch and wait for its end."""
    sdk = node.sdk()
    lines = [line(f"item-{n}", f"say {n}", model=model) for n in range(count)]
    return wait_until_ended(sdk, submit(sdk, lines).id, LIMIT_S)


def test_a_model_linked_while_the_node_runs_answers(node: RunningNode) -> None:
    """By chat and by batch, with no restart of anything."""
    before = node.pids("workers.consumer")
    link(node, "second")
    wait_until_served(node, "second")
    wait_for_states(node, "second", "ready")
    assert first_answer(node, "second") == "are you there"
    assert done(batch_of(node, "second")) == 20
    assert set(before) <= set(node.pids("workers.consumer")), "no consumer was started anew"
    assert ask(node, "first") == "are you there"


def test_a_tuned_model_is_loaded_when_asked_for_like_its_base(node: RunningNode) -> None:
    """It is unloaded until then; publishing a candidate leaves its engine as it is."""
    link(node, "ft:first::1", base="first", job="ftjob-1", candidate=True)
    wait_for_states(node, "ft:first::1", "unloaded")
    assert done(batch_of(node, "ft:first::1")) == 20
    wait_for_states(node, "ft:first::1", "ready")
    [before] = replicas(node, "ft:first::1")
    assert not node.stores.models.publish("ft:first::1").candidate
    assert first_answer(node, "ft:first::1") == "are you there"
    assert [r.pid for r in replicas(node, "ft:first::1")] == [before.pid]


def test_a_removed_model_is_unloaded_and_forgotten(node: RunningNode) -> None:
    """Given one that answered, then its process ends and reports name it no more."""
    link(node, "short")
    wait_for_states(node, "short", "ready")
    assert first_answer(node, "short") == "are you there"
    node.stores.models.remove("short")
    wait_for_states(node, "short")
    assert "short is not served any more" in story(node)
    assert node.pids("workers.inference.engines.host", "short-") == []
    wait_for(lambda: not node.stores.models.knows("short", "local"), "short to be gone", LIMIT_S)
    with pytest.raises(openai.APIStatusError) as refused:
        ask(node, "short")
    assert refused.value.status_code in (404, 503), "the API's view may be a second old"
    link(node, "short")
    wait_for_states(node, "short", "ready")
    assert first_answer(node, "short") == "are you there"


def test_what_is_left_of_a_removed_models_batch_fails_by_name() -> None:
    """Given a batch in the middle, when its model is removed, then each line ends once."""
    slow = echo("base", options={"delay_s": 0.05}, memory_share=0.5)
    with running_node(models=(slow,), node=QUICK, queue={"chunk_items": 20}) as node:
        link(node, "ft:base::3", base="base")
        sdk = node.sdk()
        batch = submit(sdk, [line(f"i-{n}", "a b c d", model="ft:base::3") for n in range(1000)])
        wait_for(lambda: done(sdk.batches.retrieve(batch.id)) > 0, "a part", LIMIT_S)
        node.stores.models.remove("ft:base::3")
        ended = wait_until_ended(sdk, batch.id, LIMIT_S)
        counts = ended.request_counts
        assert counts is not None
        assert counts.completed > 0
        assert counts.failed > 0
        assert counts.completed + counts.failed == 1000
        assert "was removed" in sdk.files.content(ended.error_file_id or "").text


def test_models_come_also_after_redis_was_restarted() -> None:
    """Given a model linked while Redis is down, then both pools take its tickets afterwards.

    And those of one linked before, which no configuration names.
    """
    with open_node() as node:
        link(node, "before")
        wait_for_states(node, "before", "ready")
        assert first_answer(node, "before") == "are you there"
        redis = node.redis_pid()
        os.kill(redis, signal.SIGSTOP)
        link(node, "meanwhile")
        wait_for(lambda: "meanwhile" in story(node), "the model to be loaded", LIMIT_S)
        os.kill(redis, signal.SIGKILL)
        for name in ("before", "meanwhile"):
            wait_for(lambda n=name: is_ready(node, n), name, LIMIT_S, node.story)
            assert first_answer(node, name) == "are you there"
            assert done(batch_of(node, name)) == 20
        node.stores.models.remove("before")
        wait_for_states(node, "before")
        link(node, "after")
        wait_for_states(node, "after", "ready")
        assert first_answer(node, "after") == "are you there"


def test_a_base_and_what_was_tuned_from_it_take_turns() -> None:
    """Given one GPU that holds one of them, then each leaves for the other, and none fails."""
    base = echo("base", options={"delay_s": 0.02})
    with running_node(models=(base,), node=QUICK, queue={"chunk_items": 20}) as node:
        wait_for_states(node, "base", "ready")
        link(node, "ft:base:x:1", base="base")
        wait_until_served(node, "ft:base:x:1")
        assert states(node, "base") == ["ready"], "nobody asked for the other one yet"
        assert first_answer(node, "ft:base:x:1") == "are you there"
        wait_for_states(node, "base", "unloaded")
        sdk = node.sdk()
        names = ("base", "ft:base:x:1")
        batches = [
            submit(sdk, [line(f"i-{n}", "a b c", model=name) for n in range(1500)])
            for name in names
        ]
        for batch in batches:
            ended = wait_until_ended(sdk, batch.id, 120)
            assert ended.request_counts is not None
            assert (ended.request_counts.completed, ended.request_counts.failed) == (1500, 0)
        assert story(node).count("makes room for") >= 2
        node.stores.models.remove("ft:base:x:1")
        wait_for_states(node, "base", "ready")


def test_a_base_with_room_beside_it_stays() -> None:
    """Given a memory share of a half, then both answer from memory."""
    with running_node(models=(echo("base", memory_share=0.5),), node=QUICK) as node:
        with traffic(node, "base", clients=2) as kept:
            link(node, "ft:base::2", base="base")
            wait_until_served(node, "ft:base::2")
            assert first_answer(node, "ft:base::2") == "are you there"
        assert kept.failures == []
        assert (states(node, "base"), states(node, "ft:base::2")) == (["ready"], ["ready"])
