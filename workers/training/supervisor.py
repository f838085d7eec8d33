"""Starts a trainer, asks it to stop, and leaves no process of it behind.

    python -m workers.training.supervisor --log FILE --stop-s 60 [--hold FD]… -- COMMAND…

Knows nothing of jobs, Redis or GPUs. It is a subreaper: whatever the trainer starts, also in a
session of its own, becomes its child when orphaned, so it can end all of it. On its stdin it takes
the words ``stop`` (SIGTERM to the trainer, SIGKILL to everything after ``--stop-s``) and ``kill``;
the end of stdin means that whoever started it is gone, which is the same as ``stop``. On its
stdout it says ``{"started": PID, "port": PORT}`` and, when nothing is left,
``{"ended": STATUS}``, negative for a signal. Its exit status is the trainer's (128 + N for
signal N).

Descriptors given with ``--hold`` (locks) stay open in it and in the trainer until both are gone.
If the supervisor itself is killed, the kernel kills the trainer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from shared.process import free_port, parent_of
from workers.bound import bound

STOP = b"stop"
KILL = b"kill"
_PR_SET_CHILD_SUBREAPER = 36
_SWEEP_S = 0.02
_NOT_STARTED = 127


class Supervisor:
    """One trainer's life. ``run`` returns its status when none of its processes is left."""

    def __init__(self, command: Sequence[str], log: Path, *, stop_s: float) -> None:
        self._command = tuple(command)
        self._log = log
        self._stop_s = stop_s
        self._trainer = 0
        self._status: int | None = None
        self._kill_at: float | None = None
        self._said = b""
        self._listening = True

    def run(self, hold: Sequence[int], wake: int) -> int:
        """Start the trainer and look after it. ``wake`` becomes readable with every signal."""
        port = free_port()
        self._trainer = self._start(hold, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        say(started=self._trainer, port=port)
        if self._kill_at is not None:  # asked meanwhile
            self._pass_on_request()
        while self._status is None:
            self._wait(wake)
            self._reap()
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                kill_descendants(os.getpid())
        self._sweep()
        say(ended=self._status)
        return self._status

    def ask_to_stop(self) -> None:
        """Let the trainer save what it has; only the first request counts."""
        if self._kill_at is None and self._status is None:
            self._kill_at = time.monotonic() + self._stop_s
            self._pass_on_request()

    def _pass_on_request(self) -> None:
        if self._trainer:
            _signal(self._trainer, signal.SIGTERM)
            # One that is stopped (SIGSTOP) would not hear the request.
            _signal(self._trainer, signal.SIGCONT)

    def _start(self, hold: Sequence[int], environment: Mapping[str, str]) -> int:
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb") as log:
            return subprocess.Popen(
                bound(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=tuple(hold),
                process_group=0,
            ).pid

    def _wait(self, wake: int) -> None:
        left_s = None
        if self._kill_at is not None:
            left_s = max(_SWEEP_S, self._kill_at - time.monotonic())
        ears = [wake, sys.stdin.fileno()] if self._listening else [wake]
        heard, _, _ = select.select(ears, [], [], left_s)
        if wake in heard:
            os.read(wake, 4096)
        if sys.stdin.fileno() in heard:
            self._listen()

    def _listen(self) -> None:
        words = os.read(sys.stdin.fileno(), 4096)
        if not words:
            self._listening = False
            self.ask_to_stop()
            return
        *lines, self._said = (self._said + words).split(b"\n")
        if STOP in lines:
            self.ask_to_stop()
        if KILL in lines:
            self._kill_at = time.monotonic()

    def _reap(self) -> None:
        """Take the status of whatever ended: the trainer, or an orphan that came to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._trainer:
                self._status = os.waitstatus_to_exitcode(status)

    def _sweep(self) -> None:
        """End what the trainer left: with each round orphans come nearer, until none is left."""
        while True:
            kill_descendants(os.getpid())
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(_SWEEP_S)


def kill_descendants(ancestor: int) -> None:
    """SIGKILL to every process below ``ancestor`` in the tree of processes, as it is now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(parent_of(int(entry.name)), []).append(int(entry.name))
    found = children.get(ancestor, [])
    for pid in found:
        found.extend(children.get(pid, ()))
        _signal(pid, signal.SIGKILL)


def say(**words: Any) -> None:
    """One line to whoever started us, who may be gone."""
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(words).encode() + b"\n")


def _signal(pid: int, number: signal.Signals) -> None:
    # The trainer's number cannot be another process's before we have taken its status.
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _woken_by_signals(supervisor: Supervisor) -> int:
    """A descriptor that becomes readable when a child ends or somebody asks us to stop."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            supervisor.ask_to_stop()

    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return readable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one trainer to its end."""
    parser = argparse.ArgumentParser(description="Run one trainer and leave nothing of it behind.")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--stop-s", type=float, required=True)
    parser.add_argument("--hold", type=int, action="append", default=[])
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(arguments)
    _become_subreaper()
    supervisor = Supervisor(args.command, args.log, stop_s=args.stop_s)
    wake = _woken_by_signals(supervisor)
    try:
        status = supervisor.run(args.hold, wake)
    except OSError as error:
        say(ended=_NOT_STARTED, reason=f"{error.filename or args.log}: {error.strerror}")
        return _NOT_STARTED
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
