"""A trainer's process as its consumer sees it: started, asked to stop, watched, swept up after."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.ids import new_id
from workers.processes import describe_exit
from workers.strays import MARK, end_strays, find_strays
from workers.training.supervisor import KILL, STOP

JOB_MARK = "VLMQ_FINETUNE"
"""Every process of a fine-tune has the work's name (the job's id) in this environment variable."""
_COMMAND_MARK = "VLMQ_FINETUNE_COMMAND"
"""And the name of this very command in this one."""
SUPERVISOR_GRACE_S = 10.0
"""How much longer than ``stop_s`` a supervisor may take before it is killed itself."""
_POLL_S = 0.05


@dataclass(frozen=True)
class Ending:
    """How a command ended. ``status`` is negative for a signal, None if nobody saw it."""

    status: int | None
    words: str
    """For people, such as ``killed by SIGKILL``."""


class TrainingProcess:
    """One supervised command. To be used by one thread.

    ``name`` says whose processes these are, so that a later command of that name can end what is
    left of this one. ``environment`` is added to this process's own. ``hold`` are locks that the supervisor takes
    over: they are closed here, and let go when nothing of the command is left.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        run_dir: Path,
        log: Path,
        stop_s: float,
        environment: Mapping[str, str],
        hold: Sequence[BinaryIO] = (),
    ) -> None:
        self._command = new_id("command_")
        self._stop_s = stop_s
        self._kill_at: float | None = None
        descriptors = [stream.fileno() for stream in hold]
        self._supervisor = subprocess.Popen(
            [
                *(sys.executable, "-m", "workers.training.supervisor"),
                *("--log", str(log), "--stop-s", str(stop_s)),
                *(word for number in descriptors for word in ("--hold", str(number))),
                *("--", *command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **environment,
                MARK: str(run_dir),
                JOB_MARK: name,
                _COMMAND_MARK: self._command,
            },
            pass_fds=descriptors,
            start_new_session=True,
        )
        for stream in hold:
            stream.close()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._supervisor.pid

    def ended(self) -> bool:
        """Whether nothing of it is left; kills a supervisor that does not do as it is told."""
        if self._supervisor.poll() is not None:
            return True
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._supervisor.kill()
        return False

    def stop(self) -> None:
        """Ask the command to save what it has and to end; at once, or after ``stop_s``."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._stop_s + SUPERVISOR_GRACE_S
        self._say(STOP)

    def kill(self) -> None:
        """End it now."""
        self._kill_at = min(self._kill_at or float("inf"), time.monotonic() + SUPERVISOR_GRACE_S)
        self._say(KILL)

    def status(self) -> Ending:
        """How it ended; to be asked once, when it has. Sweeps up after a killed supervisor."""
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.close()
        said = self._supervisor.stdout.read().decode(errors="replace")
        self._supervisor.stdout.close()
        self._supervisor.wait()
        # By its own name only: another worker may have started the same job's next attempt.
        end_strays(self._command, _COMMAND_MARK)
        return _ending(said, self._supervisor.returncode)

    def _say(self, word: bytes) -> None:
        assert self._supervisor.stdin is not None
        try:
            self._supervisor.stdin.write(word + b"\n")
            self._supervisor.stdin.flush()
        except BrokenPipeError:
            return  # it ended meanwhile


def end_earlier(
    name: str, *, wait_s: float, keep_going: Callable[[], None] = lambda: None
) -> list[int]:
    """End what earlier attempts at a job left on this machine; returns what had to be killed.

    Their supervisors let the trainer save a checkpoint first, as they do by themselves when their
    consumer dies (not when it is only paused); that may take ``wait_s``. ``keep_going`` may raise
    to stop the waiting.
    """
    deadline = time.monotonic() + wait_s
    supervisors = _supervisors(name)
    for pid in supervisors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while supervisors and time.monotonic() < deadline:
        keep_going()
        time.sleep(_POLL_S)
        supervisors = _supervisors(name)
    return end_strays(name, JOB_MARK)


def _supervisors(name: str) -> list[int]:
    return [pid for pid in find_strays(name, JOB_MARK) if _is_supervisor(pid)]


def _is_supervisor(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"workers.training.supervisor" in command


def _ending(said: str, exit_status: int) -> Ending:
    for line in said.splitlines():
        try:
            words = json.loads(line)
        except ValueError:
            continue
        if isinstance(words, dict) and "ended" in words:
            status = int(words["ended"])
            return Ending(status, str(words.get("reason") or describe_exit(status)))
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return Ending(None, f"its supervisor was lost ({describe_exit(exit_status)}): {last[0]}")
