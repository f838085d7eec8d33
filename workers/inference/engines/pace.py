"""How fast batch prompts may enter an engine while somebody chats.

An engine works in steps, and a chat's first word waits for the step in which its prompt arrives. A
batch that fills every free slot at once makes steps with dozens of prompts, again and again,
because what began together ends together. Let in one by one, at the rate at which they finish, the
same prompts make short steps. Nothing is held back while nobody chats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CHATTING_S = 10.0
"""So long after a chat the next one is expected."""
GROWTH = 1.25
"""How much faster than they finish prompts may enter, so that an engine is filled after all."""
BUCKET_S = 0.5
BURST_S = 0.02
MIN_BURST = 2.0


class Pace:
    """A rate for admissions, in cost per second; what a prompt costs is the caller's to say.

    ``floor`` is the rate that is always allowed. Times are those of ``clock``, in seconds.
    """

    def __init__(self, floor: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._floor = floor
        self._clock = clock
        self._chat_at = float("-inf")
        self._allowed = 0.0
        self._allowed_at = clock()
        self._bucket_at = clock()
        self._finished = 0.0
        self._finished_before = 0.0

    def chat(self) -> None:
        """Somebody chats."""
        if not self.is_kept:
            self._allowed, self._allowed_at = MIN_BURST, self._clock()
        self._chat_at = self._clock()

    def finished(self, cost: float) -> None:
        """A batch prompt left the engine."""
        self._turn_bucket()
        self._finished += cost

    @property
    def is_kept(self) -> bool:
        """Whether prompts are let in by pace now; otherwise they need not ask."""
        return self._clock() - self._chat_at < CHATTING_S

    def may_enter(self) -> bool:
        """Whether the next prompt may enter now."""
        if not self.is_kept:
            return True
        now = self._clock()
        rate = self._rate()
        self._allowed += rate * (now - self._allowed_at)
        self._allowed = min(self._allowed, max(MIN_BURST, rate * BURST_S))
        self._allowed_at = now
        return self._allowed > 0

    def entered(self, cost: float) -> None:
        """A batch prompt entered; one that costs much keeps the next ones waiting longer."""
        self._allowed -= cost

    def _rate(self) -> float:
        self._turn_bucket()
        lately = max(self._finished, self._finished_before) / BUCKET_S
        return max(self._floor, GROWTH * lately)

    def _turn_bucket(self) -> None:
        passed = self._clock() - self._bucket_at
        if passed < BUCKET_S:
            return
        self._finished_before = self._finished if passed < 2 * BUCKET_S else 0.0
        self._finished = 0.0
        self._bucket_at = self._clock()
