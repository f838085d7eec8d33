"""GPUs lent to training and given back. Real nodes; the echo engine only pretends to need a GPU."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.borrowed_gpus import borrowed, freed_for
from tests.faults.batches import (
    assert_each_answered_once,
    done,
    numbered,
    submit,
    wait_until_ended,
)
from tests.fleets import (
    LIMIT_S,
    QUICK,
    ask,
    echo,
    on_demand,
    replicas,
    states,
    story,
    traffic,
    wait_for_states,
)
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(240)
SLOW: dict[str, Any] = {"delay_s": 0.05}


def chat(node: RunningNode, model: str) -> httpx.Response:
    """One chat without an SDK around it."""
    body = {"model": model, "messages": [{"role": "user", "content": "are you there"}]}
    return httpx.post(f"{node.base_url}/chat/completions", json=body, timeout=LIMIT_S)


def wait_until_freed(node: RunningNode, gpu: str, job: str) -> None:
    """Wait until the fleet says that no engine is left on a GPU."""
    wait_for(
        lambda: freed_for(node.settings.run_dir, gpu) == job,
        f"GPU {gpu} to be free for {job}",
        LIMIT_S,
        node.story,
    )


def test_a_lent_gpu_is_left_and_taken_again_when_its_borrower_dies() -> None:
    """Chats get a 503 that says when and why; kill -9 of the borrower brings the engine back."""
    with running_node(models=(echo("echo"),), node=QUICK) as node:
        wait_for_states(node, "echo", "ready")
        with borrowed(node.settings.run_dir, "0", job="ftjob-1") as holder:
            wait_until_freed(node, "0", "ftjob-1")
            assert node.engine_pids() == []
            wait_for_states(node, "echo", "lent")
            assert replicas(node, "echo")[0].detail == "GPU 0 is lent to fine-tune ftjob-1"
            wait_for(lambda: chat(node, "echo").json()["error"]["code"] == "gpu_lent", "", LIMIT_S)
            refused = chat(node, "echo")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "30"
            said = refused.json()["error"]
            assert said["message"] == "GPU 0 is lent to fine-tune ftjob-1; try again in a while"
            assert said["type"] == "server_error"
            holder.kill()
            wait_for_states(node, "echo", "ready")
        assert freed_for(node.settings.run_dir, "0") is None
        wait_for(lambda: chat(node, "echo").status_code == 200, "an answer", LIMIT_S)


def test_a_batch_waits_for_the_gpu_to_come_back() -> None:
    """Given a batch in the middle, then each line is answered once and no attempt was counted."""
    models = ({**echo("echo"), "options": SLOW},)
    with running_node(models=models, node=QUICK, queue={"chunk_items": 20}) as node:
        sdk = node.sdk()
        batch = submit(sdk, numbered(600))
        wait_for(lambda: done(sdk.batches.retrieve(batch.id)) > 0, "a part", LIMIT_S)
        with borrowed(node.settings.run_dir, "0", job="ftjob-1"):
            wait_until_freed(node, "0", "ftjob-1")
            so_far = done(sdk.batches.retrieve(batch.id))
            assert 0 < so_far < 600
            # Three turns of the reaper, which publishes tickets all the while.
            turns = count_turns(node)
            wait_for(lambda: count_turns(node) >= turns + 3, "tickets to be dropped", LIMIT_S)
            assert done(sdk.batches.retrieve(batch.id)) == so_far
            assert sdk.batches.retrieve(batch.id).status == "in_progress"
        ended = wait_until_ended(sdk, batch.id, LIMIT_S)
        assert_each_answered_once(sdk, ended, 600)
        attempts = node.stores.batches.folder(batch.id) / "attempts"
        assert not attempts.exists() or list(attempts.iterdir()) == []
        assert ended.model_extra is not None
        assert ended.model_extra["vlmq"]["warning"] is None


def count_turns(node: RunningNode) -> float:
    """The server's clock in turns of the reaper."""
    seconds, _ = node.stores.redis.time()
    return float(seconds) / node.settings.queue.reap_s


def test_replicas_on_other_gpus_go_on() -> None:
    """Given two GPUs and traffic, when one is lent and given back, then no request fails."""
    both = {**echo("echo"), "gpus": ["0", "1"], "replicas": 2, "options": {"delay_s": 0.01}}
    with running_node(models=(both,), node=QUICK) as node:
        wait_for_states(node, "echo", "ready", "ready")
        with traffic(node, "echo") as kept:
            with borrowed(node.settings.run_dir, "1", job="ftjob-2"):
                wait_until_freed(node, "1", "ftjob-2")
                wait_for_states(node, "echo", "ready", "lent")
                assert len(node.engine_pids()) == 1
            wait_for_states(node, "echo", "ready", "ready")
        assert kept.failures == []
        assert "echo/1 leaves: GPU 1 is lent to fine-tune ftjob-2" in story(node)


def test_all_gpus_of_a_model_lent_one_after_the_other() -> None:
    """It goes on with what is left, then waits, and comes back GPU by GPU."""
    both = {**echo("echo"), "gpus": ["0", "1"], "replicas": 2}
    run = running_node(models=(both,), node=QUICK)
    with run as node, borrowed(node.settings.run_dir, "0", job="ftjob-a"):
        wait_for_states(node, "echo", "ready", "lent")
        with borrowed(node.settings.run_dir, "1", job="ftjob-b"):
            wait_for_states(node, "echo", "lent", "lent")
            wait_until_freed(node, "0", "ftjob-a")
            wait_until_freed(node, "1", "ftjob-b")
            assert node.engine_pids() == []
        wait_for_states(node, "echo", "ready", "lent")
        wait_for(lambda: chat(node, "echo").status_code == 200, "an answer", LIMIT_S)


def test_a_gpu_that_no_engine_uses_is_free_at_once() -> None:
    """And a model elsewhere notices nothing."""
    elsewhere = echo("echo")
    with running_node(models=(elsewhere,), node=QUICK, finetune={"gpus": ["1"]}) as node:
        [before] = node.engine_pids()
        with borrowed(node.settings.run_dir, "1", job="ftjob-1"):
            wait_until_freed(node, "1", "ftjob-1")
            assert ask(node, "echo") == "are you there"
            assert node.engine_pids() == [before]


def test_a_node_that_starts_while_its_gpu_is_lent_loads_nothing() -> None:
    """It is up and says why; what fits is loaded when the GPU comes back."""
    models = (echo("a", memory_share=0.5), on_demand("b", memory_share=0.5))
    with running_node(models=models, node=QUICK, start=False) as node:
        (node.settings.run_dir / "lent").mkdir(mode=0o700, parents=True)
        node.settings.run_dir.chmod(0o700)
        with borrowed(node.settings.run_dir, "0", job="ftjob-1"):
            node.launch()
            wait_until_freed(node, "0", "ftjob-1")
            wait_for(lambda: reported(node) == ["lent", "lent"], "the report", LIMIT_S, node.story)
            assert node.engine_pids() == []
        wait_for_states(node, "a", "ready")
        wait_for_states(node, "b", "ready")


def reported(node: RunningNode) -> list[str]:
    """The states of both models, once there is a Redis to ask."""
    if not (node.settings.run_dir / "redis.sock").exists():
        return []
    return [*states(node, "a"), *states(node, "b")]


def test_an_engine_that_does_not_finish_is_given_so_long_only() -> None:
    """Given requests that take longer than may be waited, then its work is done again later."""
    models = ({**echo("echo"), "options": {"delay_s": 1.0}},)
    finetune = {"lend_wait_s": 2}
    with running_node(models=models, node=QUICK, finetune=finetune) as node:
        sdk = node.sdk()
        batch = submit(sdk, numbered(20))
        wait_for(lambda: lease_held(node), "a chunk in hand", LIMIT_S)
        with borrowed(node.settings.run_dir, "0", job="ftjob-1"):
            wait_until_freed(node, "0", "ftjob-1")
        ended = wait_until_ended(sdk, batch.id, 120)
        assert_each_answered_once(sdk, ended, 20)


def lease_held(node: RunningNode) -> bool:
    """Whether some batch process has items in the engines."""
    from workers.inference.suspects import engines_lock, in_use

    return in_use(engines_lock(node.settings.run_dir, "echo"))
