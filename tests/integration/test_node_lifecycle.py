"""A whole node: it starts, mends what breaks, stops in order, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shared.presence import NodeReport
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def own_node() -> Iterator[RunningNode]:
    """A node that these tests may break; each leaves it running."""
    with running_node(queue={"drain_s": 5}) as node:
        yield node


def report(node: RunningNode) -> NodeReport:
    """What the node says of itself."""
    [said] = node.stores.presence.nodes()
    return said


def all_ready(node: RunningNode) -> bool:
    """Whether every program and replica is ready."""
    nodes = node.stores.presence.nodes()
    return bool(nodes) and all(
        state == "ready"
        for said in nodes
        for state in [*said.programs.values(), *(r.state for r in said.replicas)]
    )


def asks(node: RunningNode) -> str | None:
    """One chat through everything."""
    answer = node.sdk(max_retries=5).chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "are you there"}], timeout=20
    )
    return answer.choices[0].message.content


def test_it_announces_its_programs(own_node: RunningNode) -> None:
    """Given a node that is up, then its report names every program and replica as ready."""
    wait_for(lambda: all_ready(own_node), "everything to be ready", 30)
    said = report(own_node)
    # Fine-tunes only where their libraries are installed.
    assert said.programs.keys() - {"finetune"} == {"redis", "reaper", "batch", "chat", "api"}
    assert [(r.model, r.replica) for r in said.replicas] == [("echo", 0)]
    assert said.replicas[0].pid in own_node.engine_pids()
    assert asks(own_node) is not None


def test_its_settings_are_written_for_this_user_only(own_node: RunningNode) -> None:
    """The snapshot may hold a password, so only its owner may read it."""
    path = own_node.settings.run_dir / "settings.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["node"]["run_id"] != ""


def test_a_second_node_on_the_same_run_dir_is_refused(own_node: RunningNode) -> None:
    """Given a running node, when another starts in its run_dir, it says so and harms nothing."""
    before = set(own_node.pids())
    second = own_node.refused()
    assert second.returncode == 1
    assert "a node already runs with run_dir" in second.stderr
    assert before <= set(own_node.pids())


@pytest.mark.parametrize("words", ["engines.host", "workers.consumer chat", "workers.reaper"])
def test_a_killed_program_is_started_again(own_node: RunningNode, words: str) -> None:
    """Given a node, when one of its programs is killed, then a new one takes its place."""
    wait_for(lambda: all_ready(own_node), "everything to be ready", 30)
    first = own_node.pids(words)
    os.kill(first[0], signal.SIGKILL)
    wait_for(lambda: bool(set(own_node.pids(words)) - set(first)), f"a new {words}", 30)
    wait_for(lambda: all_ready(own_node), "everything to be ready again", 30)
    assert asks(own_node) is not None


def test_a_killed_valkey_is_started_again_with_its_data(own_node: RunningNode) -> None:
    """Given a key in Valkey, when Valkey is killed, then it comes back and has the key."""
    own_node.stores.redis.set("vlmq:test:kept", b"1")
    first = own_node.redis_pid()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: own_node.pids("valkey-server") not in ([], [first]), "a new Valkey", 30)
    wait_for(lambda: asks(own_node) is not None, "an answer", 30)
    assert own_node.stores.redis.get("vlmq:test:kept") == b"1"


def test_kill_9_of_the_node_leaves_nothing_and_it_starts_again(own_node: RunningNode) -> None:
    """Given a running node, when it is killed, then all its processes end and it can start."""
    assert own_node.process is not None
    os.kill(own_node.process.pid, signal.SIGKILL)
    own_node.process.wait()
    wait_for(lambda: own_node.pids() == [], "all processes to end", 10)
    own_node.start()
    assert asks(own_node) is not None


def test_sigterm_stops_everything_with_status_0(own_node: RunningNode) -> None:
    """Given a running node, when it gets SIGTERM, then it exits 0 and no process is left."""
    assert own_node.stop() == 0
    assert own_node.pids() == []
    story = (own_node.folder / "node.log").read_text()
    assert story.rstrip().endswith("stopped")
    own_node.start()


def test_a_model_that_cannot_load_is_reported_with_its_reason() -> None:
    """Given an engine that fails for good, then the node says why and serves the rest."""
    broken = {"model": "broken", "engine": "no.such.module:Engine"}
    echo = {"model": "echo", "engine": "echo"}
    with running_node(models=(echo, broken), start=False) as node:
        node.stores.close()
        log = node.folder / "node.log"
        with log.open("wb") as stream:
            node.process = subprocess.Popen(
                [sys.executable, "-m", "workers.node", "--config", str(node.config)],
                stdout=stream,
                stderr=stream,
            )
        wait_for(lambda: "engine broken/0 failed" in log.read_text(), "the failure", 60)
        wait_for(lambda: node.stores.presence.serving("echo"), "echo to be served", 30)
        replicas = {r.model: r for said in node.stores.presence.nodes() for r in said.replicas}
        assert replicas["broken"].state == "failed"
        assert "no.such.module" in replicas["broken"].detail
        assert node.stop() == 0


def test_a_port_in_use_is_said_at_once(own_node: RunningNode) -> None:
    """Given a taken port, when a node starts, then it names the port and leaves nothing."""
    with running_node(api={"port": own_node.port}, start=False) as node:
        refused = node.refused()
        assert refused.returncode == 1
        assert f":{own_node.port}" in refused.stderr
        assert "--port" in refused.stderr
        assert node.pids() == []
