"""Several models on one GPU: loaded when asked for, making room for each other. Real nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.faults.batches import done, line, submit, wait_until_ended
from tests.fleets import (
    LIMIT_S,
    QUICK,
    ask,
    echo,
    on_demand,
    replicas,
    states,
    story,
    wait_for_states,
)
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """Three models of which two fit; one takes its time to load, one has slow requests."""
    models = (
        on_demand("a", memory_share=0.5, options={"delay_s": 0.02}),
        on_demand("b", memory_share=0.5, options={"setup_delay_s": 0.3}),
        on_demand("c", memory_share=0.5, options={"delay_s": 0.02}),
    )
    with running_node(models=models, node=QUICK, queue={"chunk_items": 20}) as running:
        yield running


def resident(node: RunningNode) -> set[str]:
    """Models with a process."""
    return {name for name in "abc" if any(r.pid is not None for r in replicas(node, name))}


def lines(model: str, count: int) -> list[str]:
    """A batch file for one model."""
    return [line(f"item-{n}", f"say {n}", model=model) for n in range(count)]


def test_nothing_is_loaded_before_it_is_asked_for(node: RunningNode) -> None:
    """The node is up with every model unloaded, and says what that means."""
    for name in "abc":
        assert states(node, name) == ["unloaded"]
        assert replicas(node, name)[0].detail == "loaded when somebody asks for it"
    assert node.engine_pids() == []


def test_a_chat_loads_its_model_and_waits_for_it(node: RunningNode) -> None:
    """The first request is answered, not refused."""
    assert ask(node, "b") == "are you there"
    wait_for_states(node, "b", "ready")


def test_the_least_recently_used_one_makes_room(node: RunningNode) -> None:
    """Given b and a, when c is asked for after a was used last, then b is stopped."""
    ask(node, "b")
    ask(node, "a")
    wait_for(lambda: resident(node) == {"a", "b"}, "a and b", LIMIT_S)
    ask(node, "a")
    assert ask(node, "c") == "are you there"
    wait_for_states(node, "b", "unloaded")
    wait_for(lambda: resident(node) == {"a", "c"}, "a and c", LIMIT_S)
    assert "b is being unloaded: it makes room for c" in story(node)


def test_a_batch_loads_its_model(node: RunningNode) -> None:
    """Claimable lines are a wish, too."""
    sdk = node.sdk()
    batch = wait_until_ended(sdk, submit(sdk, lines("b", 30)).id, LIMIT_S)
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.completed) == ("completed", 30)


def test_busy_models_take_turns_and_nothing_fails(node: RunningNode) -> None:
    """Given batches for three models of which two fit, then all end, with chats in between.

    Each batch is far longer than a model's least time, so that none could wait for another to end.
    """
    sdk = node.sdk()
    sizes = {"a": 3000, "b": 3000, "c": 3000}
    batches = {name: submit(sdk, lines(name, size)) for name, size in sizes.items()}
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda name: ask(node, name), "abcabc"))
    assert answers == ["are you there"] * 6
    for name, batch in batches.items():
        ended = wait_until_ended(sdk, batch.id, 120)
        assert ended.status == "completed", ended.model_dump_json(indent=1)
        assert ended.request_counts is not None
        assert (ended.request_counts.completed, ended.request_counts.failed) == (sizes[name], 0)
    assert len(resident(node)) <= 2


def test_what_waits_does_not_hold_up_what_is_loaded() -> None:
    """Given two batch processes and a busy model that may stay, others' chunks block neither."""
    models = (on_demand("a", options={"delay_s": 0.02}), on_demand("b"))
    patient = {**QUICK, "max_model_wait_s": 600}
    with running_node(models=models, node=patient, queue={"chunk_items": 20}) as node:
        sdk = node.sdk()
        first = submit(sdk, lines("a", 4000))
        wait_for(lambda: done(sdk.batches.retrieve(first.id)) > 0, "a to be at work", LIMIT_S)
        second = submit(sdk, lines("b", 100))
        assert wait_until_ended(sdk, first.id, 120).status == "completed"
        assert wait_until_ended(sdk, second.id, LIMIT_S).status == "completed"


def test_a_model_that_cannot_be_loaded_makes_no_client_wait_for_ever() -> None:
    """The first chat gets a 503, the next ones at once; the other model is served."""
    models = (on_demand("sound"), on_demand("broken", options={"fail_setup": True}))
    with running_node(models=models, node={**QUICK, "model_wait_s": 5}) as node:
        with pytest.raises(openai.InternalServerError) as refused:
            ask(node, "broken")
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"]
        wait_for_states(node, "broken", "failed")
        assert "fail_setup" in replicas(node, "broken")[0].detail
        with pytest.raises(openai.InternalServerError) as again:
            ask(node, "broken")
        assert again.value.code == "model_unavailable"
        assert ask(node, "sound") == "are you there"


def test_a_model_that_takes_too_long_is_a_503_with_retry_after() -> None:
    """``node.model_wait_s`` bounds the wait, also where engines that start are waited for longer."""
    slow = on_demand("slow", options={"setup_delay_s": 600})
    waits = {"model_wait_s": 2, "engine_wait_s": 600}
    with running_node(models=(slow, on_demand("other")), node=waits) as node:
        with pytest.raises(openai.InternalServerError) as late:
            ask(node, "slow")
        assert (late.value.status_code, late.value.code) == (503, "engine_unavailable")
        assert late.value.response.headers["retry-after"]


def test_replicas_of_one_gpu_load_one_after_the_other() -> None:
    """And those of another GPU meanwhile; each is told its share of the memory."""
    model = echo("m", gpus=["0", "1"], replicas=4, memory_share=0.6)
    # Longer than the node may take to tell of its replicas.
    model["options"] = {"setup_delay_s": 2.5}
    with running_node(models=(model,), start=False) as node:
        seen: list[set[int]] = []

        def all_ready() -> bool:
            found = replicas(node, "m")
            seen.append({r.replica for r in found if r.state == "starting" and r.pid})
            return [r.state for r in found] == ["ready"] * 4

        node.start()
        wait_for(all_ready, "four replicas", LIMIT_S, lambda: story(node))
        assert any({number % 2 for number in loading} == {0, 1} for loading in seen)
        for loading in seen:
            assert len({number % 2 for number in loading}) == len(loading), loading
        [folder] = {path.parent for path in node.settings.run_dir.glob("m-*/*.spec.json")}
        specs = [json.loads(path.read_text()) for path in folder.glob("*.spec.json")]
        assert [spec["memory_share"] for spec in specs] == [0.3] * 4


def test_what_does_not_fit_is_refused_at_start() -> None:
    """Two models that are always loaded, each with the whole GPU."""
    with running_node(models=(echo("a"), echo("b")), start=False) as node:
        refused = node.refused()
        assert refused.returncode == 1
        assert "do not fit on GPU 0 together: a (1), b (1)" in refused.stderr
        assert node.pids() == []


def test_a_node_stops_while_a_model_loads() -> None:
    """Nothing is left, and nothing waits for the load."""
    slow = on_demand("slow", options={"setup_delay_s": 300})
    with (
        running_node(models=(slow, on_demand("other")), queue={"drain_s": 2}) as node,
        ThreadPoolExecutor(1) as client,
    ):
        asked = client.submit(ask, node, "slow")
        wait_for(lambda: node.engine_pids() != [], "the load to begin", LIMIT_S)
        assert node.stop() == 0
        assert node.pids() == []
        assert isinstance(asked.exception(LIMIT_S), openai.OpenAIError)
