"""How fast batch prompts may enter an engine while somebody chats.

An engine works in steps, and a chat's first word waits for the step in which its prompt arrives. A
batch that fills every free slot at once makes steps with dozens of prompts, again and again,
because what began together ends together. Let in one by one, at the rate at which a full engine
finishes them, the same prompts make short steps. When a chat comes, nothing enters for a moment, so
that its prompt shares a step with none; if it waits longer, few do. Nothing is held back while
nobody chats.

The rate follows from how long prompts stay: with ``slots`` places and ``L`` seconds in each, a full
engine finishes ``slots / L`` a second (Little's law). An engine that is not full finishes each
sooner, so the rate rises by itself until it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

CHATTING_S = 10.0
"""So long after a chat the next one is expected."""
GROWTH = 1.1
"""How much faster than they finish prompts may enter, so that the engine stays full."""
HUSH_S = 0.1
"""So long at most nothing enters when a chat begins to wait for its first word."""
WAITED_FOR = 0.25
"""The part of the rate that is left when one waits longer."""
BURST_S = 0.01
MIN_BURST = 1.0
MEMORY = 64
"""Over about so many prompts the time that one stays is averaged."""
SHORTEST_STAY_S = 1e-4


class Pace:
    """A rate for admissions, in prompts per second, for an engine with ``slots`` for batches.

    Times are those of ``clock``, in seconds.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._chat_at = float("-inf")
        self._waiting = 0
        self._hush_from = self._hush_until = self._no_hush_before = float("-inf")
        self._stay_s = 1.0
        self._known = False
        self._allowed = 0.0
        self._allowed_at = clock()

    def chat(self) -> None:
        """Somebody chats."""
        if not self.is_kept:
            self._allowed, self._allowed_at = MIN_BURST, self._clock()
        self._chat_at = self._clock()

    def chats_wait(self, count: int) -> None:
        """So many chats are in the engine, or about to be, and have no word yet."""
        self._accrue()
        now = self._clock()
        if count and not self._waiting:
            self._hush_from = now
            self._hush_until = now + HUSH_S if now >= self._no_hush_before else now
        if self._waiting and not count:
            # Batches get as much time as was taken from them before it is taken again.
            taken_s = min(now, self._hush_until) - self._hush_from
            self._no_hush_before = max(self._no_hush_before, now + taken_s)
            self._hush_until = now
        self._waiting = count
        if count:
            self.chat()

    def finished(self, stay_s: float) -> None:
        """A batch prompt left the engine after so long inside."""
        if self._known:
            stay_s = self._stay_s + (stay_s - self._stay_s) / MEMORY
        self._stay_s = max(SHORTEST_STAY_S, stay_s)
        self._known = True

    @property
    def is_kept(self) -> bool:
        """Whether prompts are let in by pace now; otherwise they need not ask."""
        return self._waiting > 0 or self._clock() - self._chat_at < CHATTING_S

    def may_enter(self) -> bool:
        """Whether the next prompt may enter now."""
        if not self.is_kept:
            return True
        self._accrue()
        return self._allowed > 0 and self._clock() >= self._hush_until

    def entered(self) -> None:
        """A batch prompt entered."""
        self._allowed -= 1

    def _accrue(self) -> None:
        now = self._clock()
        rate = GROWTH * self._slots / self._stay_s * self._part(now)
        self._allowed += rate * (now - self._allowed_at)
        self._allowed = min(self._allowed, max(MIN_BURST, rate * BURST_S))
        self._allowed_at = now

    def _part(self, now: float) -> float:
        """How much of the rate holds now."""
        if now < self._hush_until:
            return 0.0
        return WAITED_FOR if self._waiting else 1.0
