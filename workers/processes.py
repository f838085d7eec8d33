"""Programs of a node as child processes: started, watched, restarted with back-off, stopped.

A :class:`Program` says what to run; a :class:`Child` is one program's life as a small state
machine, moved on by ``tick``. Knows nothing of engines, Redis or HTTP.
"""

from __future__ import annotations

import enum
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from workers.bound import bound
from workers.logfiles import open_log, rotate, tail

LONGEST_READY_BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A program that ran this long starts again with the shortest back-off."""
SETTLED_S = 1.0
PERMANENT_EXITS = {2, 3}
"""The exit statuses by which a program says that its configuration or model is at fault."""
PERMANENT_RETRY_S = 30.0
PERMANENT_RETRIES = 3
TAIL_LINES = 12


class State(enum.StrEnum):
    """Where a child is in its life."""

    STARTING = "starting"
    """Runs, but does not do its work yet."""
    READY = "ready"
    """Does its work."""
    RESTARTING = "restarting"
    """Died; the next start waits for the back-off."""
    FAILED = "failed"
    """Said that it cannot work; retried rarely, then never."""
    STOPPING = "stopping"
    """Was asked to go."""
    STOPPED = "stopped"
    """Is gone, as asked."""


LIVE = (State.STARTING, State.READY, State.STOPPING)


@dataclass(frozen=True)
class Program:
    """What to start, how to see that it works, how long it may take to stop."""

    name: str
    command: tuple[str, ...]
    log: Path
    ready: Callable[[], bool] | None = None
    """Asked every tick while the program starts; must answer at once. Without it a program is
    taken for ready once it has lived for SETTLED_S."""
    prepare: Callable[[], None] = lambda: None
    """Called before every start, to clear away what a killed predecessor left."""
    may_start: Callable[[], bool] = lambda: True
    """Asked before the program is started again by itself; until it says so, the start waits."""
    environment: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    retry_failed_s: float | None = None
    """How soon a program that FAILED for good is tried again all the same; None: never."""
    restart_s: float = 1.0
    """The first back-off; doubled with every crash up to LONGEST_BACKOFF_S."""
    drain_s: float = 10.0


Tell = Callable[["Child"], None]


class Child:
    """One program's process. Every method is to be called from one long-lived thread."""

    def __init__(self, program: Program, tell: Tell = lambda _: None) -> None:
        self.program = program
        self.state = State.STOPPED
        self.detail = ""
        """Why the program is not ready, for people."""
        self.last_lines: list[str] = []
        """The end of the log, after a crash."""
        self.restarts = 0
        self.started_at = 0.0
        self.ready_after_s: float | None = None
        """How long the present process took to become ready; None until it is."""
        self.next_start_at: float | None = None
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._crashes_in_a_row = 0
        self._permanent_failures = 0
        self._kill_at: float | None = None
        self._verdict = ""

    @property
    def pid(self) -> int | None:
        """The process id while the program runs."""
        return self._process.pid if self._process is not None and self.state in LIVE else None

    def start(self) -> None:
        """Start the program in a session of its own, its output going to its log."""
        self.program.prepare()
        with open_log(self.program.log) as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                bound(self.program.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.program.environment},
                pass_fds=self.program.pass_fds,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.ready_after_s = None
        self.next_start_at = None
        self.detail = ""
        self._change(State.STARTING)

    def tick(self) -> None:
        """Look after the program: notice that it is ready or dead, start it again when due."""
        now = time.monotonic()
        if self.state in LIVE and self._exited():
            self._bury(now)
        elif self.state is State.STARTING and self._is_ready(now):
            self.ready_after_s = now - self.started_at
            self._change(State.READY)
        elif self.state is State.STOPPING and self._kill_at is not None and now >= self._kill_at:
            self.kill()
        elif self._is_due(now) and self.program.may_start():
            self.restarts += 1
            self.try_to_start()

    def stop(self, limit_s: float | None = None) -> None:
        """Ask the program to finish what it has in hand; it is killed after its drain limit.

        ``limit_s`` is another limit, also for a program that is stopping already.
        """
        self.next_start_at = None
        kill_at = time.monotonic() + (self.program.drain_s if limit_s is None else limit_s)
        if self.state is State.STOPPING:
            self._kill_at = min(kill_at, self._kill_at or kill_at)
        elif self.state in {State.STARTING, State.READY}:
            self._kill_at = kill_at
            self._signal(signal.SIGTERM)
            self._change(State.STOPPING)
        else:
            self._change(State.STOPPED)

    def kill(self) -> None:
        """Kill the program and everything in its process group at once."""
        self.next_start_at = None
        if self._process is not None and self.state in LIVE:
            self.detail = f"killed after {self.program.drain_s:g} s"
            _kill_group(self._process.pid)

    def condemn(self, verdict: str) -> None:
        """Kill the program, which does not do its work; as after a crash, it starts again."""
        if self._process is not None and self.state in LIVE:
            self._verdict = verdict
            _kill_group(self._process.pid)

    def trim_log(self) -> None:
        """Keep the log of a long-running program small."""
        if rotate(self.program.log):
            self._log_start = 0

    def try_to_start(self) -> None:
        """Start the program; if the system cannot, that is a crash like any other."""
        now = time.monotonic()
        try:
            self.start()
        except OSError as error:
            # A full disk or no memory left: the other programs still need looking after.
            self._back_off(now, f"could not be started: {error.strerror or error}")

    def _is_due(self, now: float) -> bool:
        return self.next_start_at is not None and now >= self.next_start_at

    def _is_ready(self, now: float) -> bool:
        if self.program.ready is not None:
            return self.program.ready()
        return now - self.started_at >= SETTLED_S

    def _exited(self) -> bool:
        assert self._process is not None
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self._process.pid, flags) is None:
            return False
        # Before the dead leader is reaped nobody else can have its number, so this hits
        # what it left in its group and nothing else.
        _kill_group(self._process.pid)
        self._process.wait()
        return True

    def _bury(self, now: float) -> None:
        assert self._process is not None
        if self.state is State.STOPPING:
            self._change(State.STOPPED)
            return
        status = self._process.returncode
        self.last_lines = tail(self.program.log, TAIL_LINES, since=self._log_start)
        if status in PERMANENT_EXITS:
            self._fail(now)
        else:
            self._back_off(now, self._verdict or describe_exit(status))
        self._verdict = ""

    def _fail(self, now: float) -> None:
        self._permanent_failures += 1
        self.detail = self.last_lines[-1] if self.last_lines else "it gave no reason"
        retry = self._permanent_failures <= PERMANENT_RETRIES
        delay_s = PERMANENT_RETRY_S if retry else self.program.retry_failed_s
        self.next_start_at = None if delay_s is None else now + delay_s
        self._change(State.FAILED)

    def _back_off(self, now: float, reason: str) -> None:
        if now - self.started_at >= STEADY_S:
            self._crashes_in_a_row = 0
        # One that had been ready is not broken: somebody killed it, perhaps its work, and the
        # search for the item that did needs it back soon.
        was_ready = self.ready_after_s is not None
        longest_s = LONGEST_READY_BACKOFF_S if was_ready else LONGEST_BACKOFF_S
        delay_s = min(longest_s, self.program.restart_s * 2**self._crashes_in_a_row)
        self._crashes_in_a_row += 1
        self.detail = f"{reason}; starting again in {delay_s:g} s"
        self.next_start_at = now + delay_s
        self._change(State.RESTARTING)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        # Not Popen.send_signal, which reaps the child if it is dead: only _exited may do that.
        os.kill(self._process.pid, number)

    def _change(self, state: State) -> None:
        self.state = state
        self._tell(self)


def describe_exit(status: int) -> str:
    """An exit status in words: ``exit 2`` or ``killed by SIGSEGV``."""
    if status >= 0:
        return f"exit {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def python_program(module: str, *arguments: str) -> tuple[str, ...]:
    """The command line that runs one of our modules with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


def _kill_group(pgid: int) -> None:
    try:
        os.killpg(pgid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Nothing is left in the group (macOS says "not permitted" for a group of zombies).
        return
