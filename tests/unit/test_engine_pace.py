"""Batch prompts beside chats: spread out, but never slower than the engine can take them."""

from __future__ import annotations

from collections import deque

import pytest

from workers.inference.engines.pace import (
    BURST_S,
    CHATTING_S,
    GROWTH,
    HUSH_S,
    MIN_BURST,
    WAITED_FOR,
    Pace,
)

SHORT_STEP = max(MIN_BURST, GROWTH * 192 / 0.3 * BURST_S) + 1
"""No more than so many prompts enter in one step of an engine that somebody chats with."""


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
        self.entered = 0

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
            self.entered += entered
            self.largest_step = max(self.largest_step, entered)
            done += self._finish()
        return done / seconds

    def entered_in(self, seconds: float) -> int:
        """Go on for so long beside chats; the prompts that entered."""
        before = self.entered
        self.run(seconds, chatting=True)
        return self.entered - before

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
    assert engine.largest_step <= SHORT_STEP


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


def full_engine() -> Engine:
    """One that a batch has filled, with a chat now and then."""
    engine = Engine(speed=170)
    engine.run(10)
    engine.run(5, chatting=True)
    engine.largest_step = 0
    return engine


ALMOST_S = HUSH_S - 0.01
"""A hush is not over yet."""


def test_when_a_chat_begins_to_wait_nothing_enters_for_a_moment() -> None:
    """However much is finished meanwhile."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    before = len(engine.inside)
    assert engine.entered_in(ALMOST_S) == 0
    assert before - len(engine.inside) > 0.8 * 170 * ALMOST_S


def test_the_hush_ends_by_itself_and_then_a_batch_goes_slower() -> None:
    """The chat waits on, and a quarter of the rate is left."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    engine.run(HUSH_S, chatting=True)
    slow = GROWTH * WAITED_FOR * 170
    assert 0.7 * slow < engine.entered_in(1) < 1.5 * slow


def test_the_hush_ends_when_the_chat_is_heard() -> None:
    """A batch need not wait for the rest of it."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    assert engine.entered_in(HUSH_S / 5) == 0
    engine.pace.chats_wait(0)
    assert engine.entered_in(HUSH_S / 2) > 0


def test_another_chat_makes_the_hush_no_longer() -> None:
    """It begins with the first that waits, and with no other."""
    engine = full_engine()
    for count in (1, 2, 3, 2):
        engine.pace.chats_wait(count)
        assert engine.entered_in(HUSH_S / 5) == 0
    engine.pace.chats_wait(1)
    engine.run(HUSH_S / 5, chatting=True)
    assert engine.entered_in(HUSH_S) > 0


@pytest.mark.parametrize("heard_after_s", [0.03, 0.06, HUSH_S])
def test_after_a_hush_there_is_none_for_as_long(heard_after_s: float) -> None:
    """A chat that comes too soon only makes a batch slower; a later one has its hush."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    engine.run(heard_after_s, chatting=True)
    engine.pace.chats_wait(0)
    engine.run(heard_after_s - 0.01, chatting=True)
    engine.pace.chats_wait(1)
    assert engine.entered_in(ALMOST_S) > 0
    engine.pace.chats_wait(0)
    engine.run(HUSH_S, chatting=True)
    engine.pace.chats_wait(1)
    assert engine.entered_in(ALMOST_S) == 0


def test_a_chat_without_a_hush_gives_the_next_one_none_either() -> None:
    """What counts is the time since the last hush, whoever waited in between."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    engine.run(HUSH_S, chatting=True)
    engine.pace.chats_wait(0)
    engine.pace.chats_wait(1)
    engine.run(0.01, chatting=True)
    engine.pace.chats_wait(0)
    engine.pace.chats_wait(1)
    assert engine.entered_in(HUSH_S - 0.02) > 0


@pytest.mark.parametrize("waits_s", [0.02, HUSH_S / 2, HUSH_S, 1.0])
def test_after_the_hush_nothing_is_made_up_for_in_a_burst(waits_s: float) -> None:
    """Whether the chat is heard before its end or after."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    engine.run(waits_s, chatting=True)
    engine.pace.chats_wait(0)
    engine.run(1, chatting=True)
    assert engine.largest_step <= SHORT_STEP


def test_a_hush_in_which_nobody_asked_is_followed_by_no_burst() -> None:
    """Such as when the event loop had no time."""
    engine = full_engine()
    engine.pace.chats_wait(1)
    engine.now += 5 * HUSH_S
    engine.run(0.1, chatting=True)
    engine.now += 5 * HUSH_S
    engine.pace.chats_wait(0)
    engine.run(1, chatting=True)
    assert engine.largest_step <= SHORT_STEP


def test_without_a_batch_before_a_chat_has_its_hush_too() -> None:
    """The first chat of all, and one long after the last."""
    engine = Engine(speed=170)
    for _ in range(2):
        engine.pace.chats_wait(1)
        assert engine.entered_in(ALMOST_S) == 0
        engine.pace.chats_wait(0)
        engine.now += 2 * CHATTING_S


def test_even_if_chats_always_wait_a_batch_goes_on() -> None:
    """The emptier the engine, the sooner it finishes each, and the more may enter."""
    engine = Engine(speed=170)
    engine.run(3)
    engine.pace.chats_wait(1)
    engine.run(10, chatting=True)
    assert engine.run(10, chatting=True) > 0.8 * 170


@pytest.mark.parametrize(
    "rhythm",
    [(0.02,), (0.05,), (0.1,), (0.3,), (0.1, 0.005), (0.05, 0.01), (0.09, 0.01)],
    ids=lambda rhythm: "-".join(str(wait_s) for wait_s in rhythm),
)
def test_however_often_chats_come_a_batch_goes_on(rhythm: tuple[float, ...]) -> None:
    """One begins to wait as soon as another is heard: at least half of the time is the batch's."""
    engine = Engine(speed=170)
    engine.run(3)
    finished: list[float] = []
    for wait_s in rhythm * round(20 / sum(rhythm)):
        engine.pace.chats_wait(1)
        finished.append(engine.run(wait_s, chatting=True) * wait_s)
        engine.pace.chats_wait(0)
    late = finished[len(finished) // 2 :]
    assert sum(late) / 10 > 0.4 * 170


def test_a_chat_that_waits_long_keeps_the_pace() -> None:
    """Though nobody else has come since."""
    engine = Engine(speed=1)
    engine.pace.chats_wait(1)
    engine.now += 2 * CHATTING_S
    assert engine.pace.is_kept


def test_after_the_last_chat_the_pace_is_given_up() -> None:
    """Ten seconds later everything may enter at once."""
    engine = Engine(speed=1)
    engine.pace.chat()
    assert engine.pace.is_kept
    engine.now += CHATTING_S
    assert not engine.pace.is_kept
    assert all(engine.pace.may_enter() for _ in range(1000))
