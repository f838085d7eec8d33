"""The time a run may take, and the lines that tell how it goes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_CLOSING_S = 20.0
"""Of the budget, kept for stopping what runs and writing the results."""


class BudgetSpent(BaseException):
    """The time is up; what was measured by then counts."""


class Terminated(BaseException):
    """SIGTERM or Ctrl-C; what was measured by then counts."""


class Clock:
    """Counts from its making."""

    def __init__(self, budget_s: float) -> None:
        self._start = time.monotonic()
        self._budget_s = budget_s

    def left(self) -> float:
        """Seconds left for measuring."""
        return self._start + self._budget_s - _CLOSING_S - time.monotonic()

    def limit(self, most_s: float) -> float:
        """A limit for one step that keeps within the budget."""
        return max(1.0, min(most_s, self.left()))

    def say(self, text: str) -> None:
        """One line of progress, with the seconds so far."""
        elapsed_s = time.monotonic() - self._start
        print(f"[{elapsed_s:4.0f} s] {text}", file=sys.stderr, flush=True)


@contextmanager
def bounded(clock: Clock) -> Iterator[None]:
    """Raise BudgetSpent in the block when the time is up, Terminated when asked to end.

    Each comes once, so that what the block then does on its way out is not disturbed.
    """

    def spent(_number: int, _frame: FrameType | None) -> None:
        raise BudgetSpent

    def ended(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Terminated

    kept = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGALRM, spent),
            (signal.SIGTERM, ended),
            (signal.SIGINT, ended),
        )
    }
    signal.setitimer(signal.ITIMER_REAL, max(0.001, clock.left()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
