"""Batch prompts beside chats: spread out, but never slower than the engine can take them."""

from __future__ import annotations

from collections import deque

import pytest

from workers.inference.engines.pace import BURST_S, CHATTING_S, GROWTH, MIN_BURST, WAITED_FOR, Pace


class Engine:
    """Finishes up to ``speed`` prompts a second, each after ``least_s`` at the earliest.

    Time goes in steps of 5 ms, and there is always more to do.
    """

    def __init__(self, speed: float, slots: int = 192, least_s: float = 0.3) -> None:
        self.now = 0.0
        self.pace = Pace(slots, clock=lambda: self.now)
        self.speed = speed
        self.slots = slots
        self.least_s = least_s
        self.inside: deque[float] = deque()
        self.credit = 0.0
        self.largest_step = 0

    def run(self, seconds: float, *, chatting: bool = False) -> float:
        """Go on for so long; the prompts finished per second."""
        done = 0
        for _ in range(round(seconds / 0.005)):
            self.now += 0.005
            if chatting:
                self.pace.chat()
            entered = 0
            while len(self.inside) < self.slots and self.pace.may_enter():
                self.pace.entered()
                self.inside.append(self.now)
                entered += 1
            self.largest_step = max(self.largest_step, entered)
            done += self._finish()
        return done / seconds

    def _finish(self) -> int:
        finished = 0
        self.credit = min(self.credit + self.speed * 0.005, 1 + self.speed * 0.005)
        while self.credit >= 1 and self.inside and self.now - self.inside[0] >= self.least_s:
            self.pace.finished(self.now - self.inside.popleft())
            self.credit -= 1
            finished += 1
        return finished


def test_without_chats_nothing_is_held_back() -> None:
    """All slots fill in the first step."""
    engine = Engine(speed=100)
    engine.run(0.01)
    assert engine.largest_step == 192


@pytest.mark.parametrize("speed", [25, 170, 600])
def test_beside_chats_steps_are_short_and_the_engine_is_full_all_the_same(speed: float) -> None:
    """However fast it is: how long prompts stay sets the pace of what enters."""
    engine = Engine(speed)
    engine.run(10)
    engine.run(2, chatting=True)
    engine.largest_step = 0
    assert engine.run(20, chatting=True) > 0.95 * speed
    assert engine.largest_step <= max(MIN_BURST, GROWTH * 192 / 0.3 * BURST_S) + 1


def test_a_batch_that_starts_beside_chats_soon_has_the_whole_engine() -> None:
    """An engine that is not full finishes each sooner, and so lets more in."""
    engine = Engine(speed=170)
    engine.run(4, chatting=True)
    assert engine.run(4, chatting=True) > 0.95 * 170


def test_what_takes_no_time_is_not_held_back() -> None:
    """Such as the echo engine's answers."""
    engine = Engine(speed=40_000, least_s=0)
    engine.run(1, chatting=True)
    assert engine.run(2, chatting=True) > 0.9 * 40_000 * 0.9


def test_while_a_chat_waits_for_its_first_word_a_batch_goes_slower() -> None:
    """A quarter of the rate; afterwards nothing is made up for in a burst."""
    engine = Engine(speed=170)
    engine.run(10)
    engine.run(5, chatting=True)
    engine.pace.chat_waits()
    before = len(engine.inside)
    engine.run(0.2, chatting=True)
    kept = 170 * 0.2 * (1 - GROWTH * WAITED_FOR)
    assert before - len(engine.inside) > 0.7 * kept
    engine.largest_step = 0
    engine.pace.chat_heard()
    engine.run(1, chatting=True)
    assert engine.largest_step <= max(MIN_BURST, GROWTH * 192 / 0.3 * BURST_S) + 1


def test_even_if_chats_always_wait_a_batch_goes_on() -> None:
    """The emptier the engine, the sooner it finishes each, and the more may enter."""
    engine = Engine(speed=170)
    engine.run(3)
    engine.pace.chat_waits()
    engine.run(10, chatting=True)
    assert engine.run(10, chatting=True) > 0.8 * 170


def test_after_the_last_chat_the_pace_is_given_up() -> None:
    """Ten seconds later everything may enter at once."""
    engine = Engine(speed=1)
    engine.pace.chat()
    assert engine.pace.is_kept
    engine.now += CHATTING_S
    assert not engine.pace.is_kept
    assert all(engine.pace.may_enter() for _ in range(1000))
