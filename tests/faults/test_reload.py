"""A model replaced while it is asked: no request fails, whatever the new revision does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import vlmq
from shared.presence import ReplicaReport
from tests.faults.batches import assert_each_answered_once, done, numbered, submit, wait_until_ended
from tests.fleets import LIMIT_S, Traffic, ask, replicas, states, story, traffic
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(240)

SLOW: dict[str, Any] = {"setup_delay_s": 0.5, "token_delay_s": 0.01, "faults": True}
NODE = {"engine_restart_s": 0.1, "engine_wait_s": 40}
LINES = 1500


def model(**fields: Any) -> dict[str, Any]:
    """One echo model whose answers take a while."""
    return {"model": "echo", "engine": "echo", "options": SLOW, **fields}


PLACES = [
    pytest.param(model(replicas=2, gpus=["0"]), id="two replicas"),
    pytest.param(model(gpus=["0"], memory_share=0.5), id="one and room for two"),
    pytest.param(model(gpus=["0"]), id="one and no room"),
]


def command(node: RunningNode, *words: str) -> str:
    """Run ``vlmq models …`` on the node's data."""
    options = ["--data-dir", str(node.settings.data_dir)]
    done = CliRunner().invoke(vlmq, ["models", *words, *options])
    assert done.exit_code == 0, done.output
    return done.output


def pids(node: RunningNode) -> set[int | None]:
    """The processes of the ready replicas."""
    return {replica.pid for replica in replicas(node, "echo") if replica.state == "ready"}


def wait_until_replaced(node: RunningNode, before: set[int | None], count: int) -> None:
    """Every replica is ready again, and none of them is one of ``before``."""

    def replaced() -> bool:
        now = pids(node)
        return len(now) == count == len(states(node, "echo")) and not now & before

    wait_for(replaced, "new replicas", LIMIT_S, lambda: f"{replicas(node, 'echo')}\n{story(node)}")


def assert_nothing_failed(kept: Traffic) -> None:
    """Every stream was whole."""
    assert kept.failures == []
    assert kept.answered > 0


@pytest.mark.parametrize("served", PLACES)
def test_a_reload_under_load_drops_nothing(served: dict[str, Any]) -> None:
    """Given streams and a batch, when the model is reloaded twice, then all are answered."""
    with running_node(models=(served,), node=NODE, queue={"chunk_items": 50}) as node:
        count = served.get("replicas", 1)
        wait_for(lambda: len(pids(node)) == count, "all replicas", LIMIT_S)
        sdk = node.sdk()
        batch = submit(sdk, numbered(LINES))
        with traffic(node, "echo") as kept:
            for revision in (2, 3):
                before = pids(node)
                assert f"revision {revision}" in command(node, "reload", "echo")
                wait_until_replaced(node, before, count)
        assert_nothing_failed(kept)
        assert_each_answered_once(sdk, wait_until_ended(sdk, batch.id, 120), LINES)


def unloadable(node: RunningNode, folder: Path) -> None:
    """Make the next revision of ``echo`` one that cannot be loaded, by linking it anew."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    command(node, "link", "echo", str(folder), "--engine", "echo", "--replace")


@pytest.mark.parametrize("served", PLACES)
def test_a_revision_that_cannot_be_loaded_takes_nothing_down(
    served: dict[str, Any], tmp_path: Path
) -> None:
    """Given streams, when the new revision fails to load, then the old one goes on and says why."""
    served = {**served, "options": {**SLOW, "fail_with_path": True}}
    with running_node(models=(served,), node=NODE) as node:
        count = served.get("replicas", 1)
        wait_for(lambda: len(pids(node)) == count, "all replicas", LIMIT_S)

        def refused() -> bool:
            found = replicas(node, "echo")
            return len(pids(node)) == count == len(found) and any(
                "revision 2 could not be loaded" in replica.detail for replica in found
            )

        with traffic(node, "echo") as kept:
            unloadable(node, tmp_path / "checkpoint")
            wait_for(refused, "the refusal", LIMIT_S, lambda: story(node))
        assert_nothing_failed(kept)
        told = CliRunner().invoke(vlmq, ["doctor", "--config", str(node.config)])
        assert "revision 2 could not be loaded" in told.output
        assert "vlmq models reload echo" in told.output


def test_a_model_that_never_loaded_is_mended_by_linking_it_anew(tmp_path: Path) -> None:
    """Given a model that cannot be loaded, when it is linked anew, then no restart is needed."""
    served = model(options={"fail_with_path": True})
    with running_node(models=(served,), start=False) as node:
        folder = tmp_path / "checkpoint"
        unloadable(node, folder)
        node.launch()
        wait_for(lambda: "engine echo/0 failed" in story(node), "the failure", LIMIT_S)
        node.stores.models.link("echo", None, engine="echo", replace=True)
        wait_for(lambda: states(node, "echo") == ["ready"], "the mended model", LIMIT_S)
        wait_for(node.is_up, "the API", LIMIT_S)
        assert ask(node, "echo") == "are you there"


def starting(node: RunningNode) -> list[ReplicaReport]:
    """Replicas whose process loads."""
    return [r for r in replicas(node, "echo") if r.state == "starting" and r.pid is not None]


@pytest.mark.parametrize("victim", ["starting", "ready"])
def test_kill_9_during_a_reload(victim: str) -> None:
    """Given a reload of two replicas, when one is killed, then the reload is finished all the same."""
    with running_node(models=(model(replicas=2, gpus=["0"]),), node=NODE) as node:
        wait_for(lambda: len(pids(node)) == 2, "two replicas", LIMIT_S)
        before = pids(node)
        sdk = node.sdk()
        batch = submit(sdk, numbered(LINES))
        wait_for(lambda: done(sdk.batches.retrieve(batch.id)) > 0, "the batch to run", LIMIT_S)
        command(node, "reload", "echo")
        wait_for(lambda: starting(node) != [], "a replica to load", LIMIT_S)
        pid = starting(node)[0].pid if victim == "starting" else (pids(node) & before).pop()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until_replaced(node, before | {pid}, 2)
        assert_each_answered_once(sdk, wait_until_ended(sdk, batch.id, 120), LINES)


def test_an_engine_that_hangs_is_killed_and_started_again() -> None:
    """Given a stopped engine process, then it is found out, and requests are answered again."""
    node_settings = {**NODE, "engine_silence_s": 3}
    with running_node(models=(model(gpus=["0"]),), node=node_settings) as node:
        [pid] = node.engine_pids()
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: pids(node) not in (set(), {pid}), "another engine", LIMIT_S)
        assert "hung: it said nothing for 3 s" in story(node)
        assert ask(node, "echo") == "are you there"


def test_an_engine_that_never_loads_is_killed_and_tried_again() -> None:
    """Given a load that hangs, then it is condemned, and its model is not given up."""
    node_settings = {**NODE, "load_limit_s": 1}
    hanging = model(options={"setup_delay_s": 3600}, load="on_demand", gpus=["0"])
    with running_node(models=(hanging,), node=node_settings, start=False) as node:
        node.launch()
        wait_for(
            lambda: story(node).count("hung: it was not loaded after 1 s") >= 2,
            "two verdicts",
            LIMIT_S,
            node.story,
        )
        wait_for(lambda: "could not be loaded" in story(node), "the reason", LIMIT_S, node.story)


def test_an_engine_that_hangs_while_it_is_replaced_does_not_stop_that() -> None:
    """Given a stopped engine process, when it is to make room for its successor, then it does."""
    node_settings = {**NODE, "engine_silence_s": 3}
    with running_node(models=(model(gpus=["0"]),), node=node_settings) as node:
        before = pids(node)
        [pid] = node.engine_pids()
        os.kill(pid, signal.SIGSTOP)
        command(node, "reload", "echo")
        wait_until_replaced(node, before, 1)
        assert ask(node, "echo") == "are you there"


def test_a_node_that_was_suspended_blames_no_engine() -> None:
    """Given a node process that was stopped for longer than engines may be silent, all live on."""
    node_settings = {**NODE, "engine_silence_s": 2}
    with running_node(models=(model(gpus=["0"]),), node=node_settings) as node:
        before = node.engine_pids()
        assert node.process is not None
        wait_for(lambda: states(node, "echo") == ["ready"], "the engine", LIMIT_S)
        os.kill(node.process.pid, signal.SIGSTOP)
        # Long enough for its report to be forgotten, which takes ten seconds.
        wait_for(lambda: node.stores.presence.nodes() == [], "the node to be missed", LIMIT_S)
        os.kill(node.process.pid, signal.SIGCONT)
        wait_for(lambda: states(node, "echo") == ["ready"], "the node to be back", LIMIT_S)
        assert ask(node, "echo") == "are you there"
        assert node.engine_pids() == before
