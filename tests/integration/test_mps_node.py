"""A node with NVIDIA's Multi-Process Service.

A stand-in takes the part of its control program: the real one runs only beside a GPU, where the
benchmarks start it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running_node import ECHO, RunningNode, running_node, wait_for
from workers.mps import CONTROL

pytestmark = pytest.mark.timeout(180)

STAND_IN = """#!/bin/sh
# As the real one: in the foreground, its socket in the folder of pipes, with a server of its own.
[ "$1" = -f ] || exit 9
sleep 1000 &
touch "$CUDA_MPS_PIPE_DIRECTORY/control"
wait
"""


@pytest.fixture
def mps_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningNode]:
    """A node, not started, with two echo engines that are told to use one GPU."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    model = {**ECHO, "gpus": ["0"], "replicas": 2}
    with running_node(
        models=(model,), start=False, node={"mps": True}, queue={"drain_s": 5}
    ) as node:
        yield node


def put_stand_in(folder: Path, text: str = STAND_IN) -> None:
    """A control program on PATH."""
    program = folder / CONTROL
    program.write_text(text)
    program.chmod(0o755)


def environment(pid: int) -> dict[str, str]:
    """What a process was started with."""
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_engines_are_told_where_the_service_is(mps_node: RunningNode, tmp_path: Path) -> None:
    """And nothing of it is left behind when the node has stopped."""
    put_stand_in(tmp_path)
    mps_node.start()
    pipes = str(mps_node.settings.run_dir / "mps")
    [control] = mps_node.pids(CONTROL, "-f")
    assert environment(control)["CUDA_MPS_PIPE_DIRECTORY"] == pipes
    # It hands out whatever GPU an engine asks for.
    assert "CUDA_VISIBLE_DEVICES" not in environment(control)
    engines = [environment(pid) for pid in mps_node.engine_pids()]
    assert [engine["CUDA_MPS_PIPE_DIRECTORY"] for engine in engines] == [pipes, pipes]
    assert [engine["CUDA_VISIBLE_DEVICES"] for engine in engines] == ["0", "0"]
    assert mps_node.pids("sleep 1000")
    assert mps_node.stop() == 0
    assert mps_node.pids() == []


def test_a_killed_service_is_started_again(mps_node: RunningNode, tmp_path: Path) -> None:
    """With clean folders; its server, which nobody would talk to any more, ends with it."""
    put_stand_in(tmp_path)
    mps_node.start()
    [control] = mps_node.pids(CONTROL, "-f")
    [server] = mps_node.pids("sleep 1000")
    (mps_node.settings.run_dir / "mps" / "stale").touch()
    os.kill(control, signal.SIGKILL)
    wait_for(lambda: control not in mps_node.pids(CONTROL, "-f") != [], "it to be back", 30)
    wait_for((mps_node.settings.run_dir / "mps" / "control").exists, "it to be ready", 30)
    assert server not in mps_node.pids("sleep 1000")
    assert not (mps_node.settings.run_dir / "mps" / "stale").exists()


def test_without_the_program_the_node_says_what_to_do(mps_node: RunningNode) -> None:
    """It does not run slower in silence."""
    refused = mps_node.refused()
    assert refused.returncode != 0
    assert f"node.mps: there is no program {CONTROL} on PATH" in refused.stdout + refused.stderr
    assert mps_node.pids() == []


def test_a_service_that_gives_up_stops_the_start(mps_node: RunningNode, tmp_path: Path) -> None:
    """With its own words, such as those about a GPU that nobody may share."""
    put_stand_in(tmp_path, "#!/bin/sh\necho 'no device to serve'\nexit 1\n")
    refused = mps_node.refused()
    assert refused.returncode != 0
    said = refused.stdout + refused.stderr
    assert "NVIDIA's Multi-Process Service did not start" in said
    assert "no device to serve" in said
    assert mps_node.pids() == []
