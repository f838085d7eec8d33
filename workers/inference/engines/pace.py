"""How fast batch prompts may enter an engine while somebody chats.

An engine works in steps, and a chat's first word waits for the step in which its prompt arrives. A
batch that fills every free slot at once makes steps with dozens of prompts, again and again,
because what began together ends together. Let in one by one, at the rate at which they finish, the
same prompts make short steps; and while a chat waits for its first word only few enter. Nothing is
held back while nobody chats.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

CHATTING_S = 10.0
"""So long after a chat the next one is expected."""
GROWTH = 1.25
"""How much faster than they finish prompts may enter, so that an engine is filled after all."""
GROWTH_UNFILLED = 3.0
"""The same while less than half of the engine's slots are taken."""
WAITED_FOR = 0.25
"""The part of the rate that is left while a chat waits for its first word."""
BURST_S = 0.01
MIN_BURST = 1.0
BUCKET_S = 0.5
BUCKETS = 6
"""The rate is that of the last three seconds: longer than a batch prompt usually takes, or what
began together would look like a rate that comes and goes."""


class Pace:
    """A rate for admissions, in cost per second; what a prompt costs is the caller's to say.

    ``floor`` is the rate that is always allowed. Times are those of ``clock``, in seconds.
    """

    def __init__(self, floor: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._floor = floor
        self._clock = clock
        self._chat_at = float("-inf")
        self._waiting = 0
        self._growth = GROWTH
        self._allowed = 0.0
        self._allowed_at = clock()
        self._bucket_at = clock()
        self._finished: deque[float] = deque([0.0], maxlen=BUCKETS)

    def chat(self) -> None:
        """Somebody chats."""
        if not self.is_kept:
            self._allowed, self._allowed_at = MIN_BURST, self._clock()
        self._chat_at = self._clock()

    def chat_waits(self) -> None:
        """A chat is in the engine and has no word yet."""
        self._accrue()
        self._waiting += 1

    def chat_heard(self) -> None:
        """It has its first word, or has ended without."""
        self._accrue()
        self._waiting -= 1

    def finished(self, cost: float) -> None:
        """A batch prompt left the engine."""
        self._turn_buckets()
        self._finished[-1] += cost

    @property
    def is_kept(self) -> bool:
        """Whether prompts are let in by pace now; otherwise they need not ask."""
        return self._clock() - self._chat_at < CHATTING_S

    def may_enter(self, filled: float) -> bool:
        """Whether the next prompt may enter now; ``filled`` is the part of the slots taken."""
        if not self.is_kept:
            return True
        self._accrue()
        self._growth = GROWTH if filled >= 0.5 else GROWTH_UNFILLED
        return self._allowed > 0

    def entered(self, cost: float) -> None:
        """A batch prompt entered; one that costs much keeps the next ones waiting longer."""
        self._allowed -= cost

    def _accrue(self) -> None:
        now, rate = self._clock(), self._rate()
        self._allowed += rate * (now - self._allowed_at)
        self._allowed = min(self._allowed, max(MIN_BURST, rate * BURST_S))
        self._allowed_at = now

    def _rate(self) -> float:
        self._turn_buckets()
        lately = sum(self._finished) / (BUCKET_S * BUCKETS)
        rate = max(self._floor, self._growth * lately)
        return rate * WAITED_FOR if self._waiting else rate

    def _turn_buckets(self) -> None:
        passed = int((self._clock() - self._bucket_at) / BUCKET_S)
        if passed < 1:
            return
        self._finished.extend([0.0] * min(passed, BUCKETS))
        self._bucket_at += passed * BUCKET_S
