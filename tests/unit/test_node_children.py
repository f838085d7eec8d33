"""A program under supervision: real child processes, short ones."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from workers import processes
from workers.processes import Child, Program, State, describe_exit

READY_THEN_SLEEP = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
DEADLINE_S = 20.0


class Stage:
    """Makes children in a temporary folder, and moves one on until something is true."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "ready"
        self.told: list[State] = []
        self.children: list[Child] = []

    def child(self, code: str, *arguments: str, restart_s: float = 0.05, **more: object) -> Child:
        """A child that runs ``code``; ready once the marker file exists."""
        program = Program(
            name="test",
            command=(sys.executable, "-c", code, *arguments),
            log=self.folder / "test.log",
            ready=self.marker.exists,
            prepare=lambda: self.marker.unlink(missing_ok=True),
            restart_s=restart_s,
            **more,  # type: ignore[arg-type]
        )
        child = Child(program, lambda child: self.told.append(child.state))
        self.children.append(child)
        return child

    def until(self, child: Child, condition: Callable[[], bool]) -> None:
        """Tick until ``condition`` holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, (child.state, child.detail, child.last_lines)
            child.tick()
            time.sleep(0.01)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A stage whose children are gone afterwards."""
    stage = Stage(tmp_path)
    yield stage
    for child in stage.children:
        child.kill()
        child.stop()
        stage.until(child, lambda child=child: child.state is State.STOPPED)  # type: ignore[misc]


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_it_becomes_ready_when_its_sign_appears(stage: Stage) -> None:
    """Given a program that makes its marker, when started, then it is starting, later ready."""
    child = stage.child(READY_THEN_SLEEP, str(stage.marker))
    child.start()
    assert child.state is State.STARTING
    stage.until(child, lambda: child.state is State.READY)
    assert child.pid is not None
    assert stage.told == [State.STARTING, State.READY]


def test_a_killed_program_is_started_again(stage: Stage) -> None:
    """Given a ready program, when it is killed, then another process takes its place."""
    child = stage.child(READY_THEN_SLEEP, str(stage.marker))
    child.start()
    stage.until(child, lambda: child.state is State.READY)
    first = child.pid
    assert first is not None
    os.kill(first, 9)
    stage.until(child, lambda: child.restarts == 1 and child.state is State.READY)
    assert child.pid != first
    assert "killed by SIGKILL" not in child.detail, "the new process has not died"
    assert State.RESTARTING in stage.told


def test_a_program_that_keeps_dying_waits_longer_each_time(stage: Stage) -> None:
    """Given a program that exits with 1, when it is restarted, then the back-off doubles."""
    child = stage.child("import sys; sys.exit('no luck')", restart_s=0.05)
    child.start()
    details: list[str] = []
    while len(details) < 3:
        stage.until(child, lambda: child.state is State.RESTARTING)
        details.append(child.detail)
        assert child.last_lines == ["no luck"]
        stage.until(child, lambda: child.state is State.STARTING)
    assert [detail.rpartition(" in ")[2] for detail in details] == ["0.05 s", "0.1 s", "0.2 s"]


def test_one_that_never_gets_ready_waits_longer_than_one_that_was(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken program must not be started for ever; one that was shot is needed back soon."""
    monkeypatch.setattr(processes, "LONGEST_READY_BACKOFF_S", 0.1)
    code = (
        "import pathlib, sys, time\n"
        "lives = pathlib.Path(sys.argv[2]); lives.open('a').write('x')\n"
        "if lives.stat().st_size < 4:\n"
        "    pathlib.Path(sys.argv[1]).touch(); time.sleep(0.3)\n"
        "sys.exit(1)\n"
    )
    child = stage.child(code, str(stage.marker), str(stage.folder / "lives"), restart_s=0.05)
    child.start()
    details: list[str] = []
    while len(details) < 5:
        stage.until(child, lambda: child.state is State.RESTARTING)
        details.append(child.detail.rpartition(" in ")[2])
        stage.until(child, lambda: child.state is State.STARTING)
    assert details == ["0.05 s", "0.1 s", "0.1 s", "0.4 s", "0.8 s"]


def test_a_program_that_cannot_be_started_again_is_tried_later(stage: Stage) -> None:
    """Given a log that cannot be written, when the restart is due, then only it has to wait."""
    child = stage.child("raise SystemExit(1)", restart_s=0.01)
    child.start()
    stage.until(child, lambda: child.state is State.RESTARTING)
    child.program.log.unlink()
    child.program.log.mkdir()
    stage.until(child, lambda: "could not be started: Is a directory" in child.detail)
    assert child.state is State.RESTARTING
    child.program.log.rmdir()
    stage.until(child, lambda: child.state is State.STARTING)


def test_a_permanent_failure_is_not_retried_in_a_loop(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given exit status 3, when it comes again and again, then the program is given up."""
    monkeypatch.setattr(processes, "PERMANENT_RETRY_S", 0.05)
    child = stage.child("import sys; print('model is damaged', file=sys.stderr); sys.exit(3)")
    child.start()
    stage.until(child, lambda: child.state is State.FAILED)
    assert child.detail == "model is damaged"
    stage.until(child, lambda: child.state is State.FAILED and child.next_start_at is None)
    assert child.restarts == processes.PERMANENT_RETRIES
    child.tick()
    assert child.pid is None


def test_a_program_that_was_given_up_may_be_tried_again_much_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a program that says so, when it has failed for good, then it is started all the same."""
    monkeypatch.setattr(processes, "PERMANENT_RETRY_S", 0.01)
    child = stage.child("raise SystemExit(3)", retry_failed_s=0.02)
    child.start()
    stage.until(child, lambda: child.restarts > processes.PERMANENT_RETRIES + 1)


def test_a_permanent_failure_waits_half_a_minute(stage: Stage) -> None:
    """Given exit status 3, then the next start is 30 seconds away, not at once."""
    child = stage.child("raise SystemExit(3)")
    child.start()
    stage.until(child, lambda: child.state is State.FAILED)
    assert child.next_start_at is not None
    assert child.next_start_at - time.monotonic() > 25


def test_stopping_lets_the_program_finish(stage: Stage) -> None:
    """Given a program that cleans up on SIGTERM, when stopped, then it gets to do so."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n    print('cleaned up'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)\n"
    )
    child = stage.child(code, str(stage.marker))
    child.start()
    stage.until(child, lambda: child.state is State.READY)
    child.stop()
    stage.until(child, lambda: child.state is State.STOPPED)
    assert child.restarts == 0
    assert "cleaned up" in child.program.log.read_text()


def test_a_program_that_will_not_stop_is_killed_with_its_children(stage: Stage) -> None:
    """Given a program and its child that ignore SIGTERM, when the limit passes, both are gone."""
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\ntime.sleep(60)\n"
    )
    child = stage.child(code, str(stage.marker), drain_s=0.3)
    child.start()
    stage.until(child, lambda: stage.marker.exists() and stage.marker.read_text() != "")
    grandchild = int(stage.marker.read_text())
    child.stop()
    stage.until(child, lambda: child.state is State.STOPPED)
    stage.until(child, lambda: gone(grandchild))


def test_what_a_crashed_program_leaves_in_its_group_is_ended(stage: Stage) -> None:
    """Given a program with a child, when only the program is killed, then the child goes too."""
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\ntime.sleep(60)\n"
    )
    child = stage.child(code, str(stage.marker), restart_s=30)
    child.start()
    stage.until(child, lambda: stage.marker.exists() and stage.marker.read_text() != "")
    grandchild = int(stage.marker.read_text())
    assert child.pid is not None
    os.kill(child.pid, 9)
    stage.until(child, lambda: child.state is State.RESTARTING)
    stage.until(child, lambda: gone(grandchild))


def test_exit_statuses_are_told_in_words() -> None:
    """An exit status and a signal each have their words."""
    assert describe_exit(2) == "exit 2"
    assert describe_exit(-11) == "killed by SIGSEGV"
