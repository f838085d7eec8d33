"""How fast batch prompts may enter an engine while somebody chats.

An engine works in steps, and a chat's first word waits for the step in which its prompt arrives. A
batch that fills every free slot at once makes steps with dozens of prompts, again and again,
because what began together ends together. Let in one by one, at the rate at which a full engine
finishes them, the same prompts make short steps; and while a chat waits for its first word only few
enter. Nothing is held back while nobody chats.

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
WAITED_FOR = 0.25
"""The part of the rate that is left while a chat waits for its first word."""
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
        self._stay_s = 1.0
        self._known = False
        self._allowed = 0.0
        self._allowed_at = clock()

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

    def finished(self, stay_s: float) -> None:
        """A batch prompt left the engine after so long inside."""
        if self._known:
            stay_s = self._stay_s + (stay_s - self._stay_s) / MEMORY
        self._stay_s = max(SHORTEST_STAY_S, stay_s)
        self._known = True

    @property
    def is_kept(self) -> bool:
        """Whether prompts are let in by pace now; otherwise they need not ask."""
        return self._clock() - self._chat_at < CHATTING_S

    def may_enter(self) -> bool:
        """Whether the next prompt may enter now."""
        if not self.is_kept:
            return True
        self._accrue()
        return self._allowed > 0

    def entered(self) -> None:
        """A batch prompt entered."""
        self._allowed -= 1

    def _accrue(self) -> None:
        now = self._clock()
        rate = GROWTH * self._slots / self._stay_s * (WAITED_FOR if self._waiting else 1)
        self._allowed += rate * (now - self._allowed_at)
        self._allowed = min(self._allowed, max(MIN_BURST, rate * BURST_S))
        self._allowed_at = now
