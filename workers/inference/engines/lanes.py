"""Who may enter the engine next: two lanes, a reserve for chat, and bounded waiting.

Knows nothing of sockets or engines. Prompts of the ``chat`` lane overtake waiting ones of the
``batch`` lane, and some running slots are for chat only, so that a chat never waits for a batch
prompt to finish while the batch keeps the engine full. While there are chats, fewer prompts of a
batch are inside, for each makes the engine's steps longer, and they enter by a pace instead of all
at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from workers.inference.engines.pace import Pace
from workers.inference.engines.wire import Lane

T = TypeVar("T")


class Lanes(Generic[T]):
    """Counts what runs and keeps what waits.

    ``max_running`` bounds both lanes together; a quarter of it, at least one, is out of reach for
    ``batch``, unless there is only one slot, and half while there are chats. ``max_waiting`` bounds
    each lane on its own. ``clock`` gives the pace its time, in seconds.
    """

    def __init__(
        self, max_running: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        reserve = max(1, max_running // 4)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._batch_alone = max(1, max_running - reserve)
        self._batch_beside_chats = max(1, max_running // 2)
        self._pace = Pace(self._batch_beside_chats, clock)
        self._running: dict[Lane, int] = {"chat": 0, "batch": 0}
        self._waiting: dict[Lane, deque[T]] = {"chat": deque(), "batch": deque()}

    @property
    def running(self) -> int:
        """How many are in the engine."""
        return self._running["chat"] + self._running["batch"]

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._waiting["chat"]) + len(self._waiting["batch"])

    def offer(self, lane: Lane, items: Sequence[T]) -> Sequence[T]:
        """Queue as many as fit and return the rest, which is refused.

        Those that could start at once do not count as waiting.
        """
        queue = self._waiting[lane]
        if lane == "chat":
            self._pace.chat()
        room = max(0, self._max_waiting + self._free(lane) - len(queue))
        queue.extend(items[:room] if room < len(items) else items)
        return items[room:]

    def take(self) -> list[T]:
        """Move all that may start now from waiting to running, chat first."""
        return self._take("chat") + self._take("batch")

    @property
    def held_back(self) -> bool:
        """Whether something waits only for its time to come: take again soon."""
        return bool(self._waiting["batch"]) and self._free("batch") > 0

    def chats_wait(self, count: int) -> None:
        """So many chats are in the engine, or about to be, and wait for their first word."""
        self._pace.chats_wait(count)

    def release(self, lane: Lane, stay_s: float) -> None:
        """One of this lane left the engine, after ``stay_s`` inside."""
        self._running[lane] -= 1
        if lane == "batch":
            self._pace.finished(stay_s)

    def withdraw(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Remove and return the waiting ones that ``unwanted`` picks."""
        removed: list[T] = []
        for lane, queue in self._waiting.items():
            removed += [item for item in queue if unwanted(item)]
            self._waiting[lane] = deque(item for item in queue if not unwanted(item))
        return removed

    def _free(self, lane: Lane) -> int:
        free = self._max_running - self.running
        if lane == "batch":
            most = self._batch_beside_chats if self._pace.is_kept else self._batch_alone
            free = min(free, most - self._running["batch"])
        return max(0, free)

    def _take(self, lane: Lane) -> list[T]:
        queue = self._waiting[lane]
        count = min(len(queue), self._free(lane))
        if lane == "batch" and self._pace.is_kept:
            return self._take_by_pace(queue, count)
        self._running[lane] += count
        return [queue.popleft() for _ in range(count)]

    def _take_by_pace(self, queue: deque[T], most: int) -> list[T]:
        taken: list[T] = []
        while len(taken) < most and self._pace.may_enter():
            taken.append(queue.popleft())
            self._pace.entered()
        self._running["batch"] += len(taken)
        return taken
