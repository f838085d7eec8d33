"""Batch prompts beside chats: spread out, but never slower than the engine can take them."""

from __future__ import annotations

from workers.inference.engines.pace import BURST_S, CHATTING_S, GROWTH, MIN_BURST, Pace


class Engine:
    """Takes prompts by pace in steps of 10 ms and finishes up to ``speed`` a second."""

    def __init__(self, speed: float, slots: int = 192) -> None:
        self.now = 0.0
        self.pace = Pace(floor=32, clock=lambda: self.now)
        self.speed = speed
        self.slots = slots
        self.inside = 0.0
        self.largest_step = 0

    def run(self, seconds: float, cost: float = 1) -> float:
        """Go on for so long with an endless backlog; the prompts finished per second."""
        done = 0.0
        for _ in range(round(seconds / 0.01)):
            self.now += 0.01
            entered = 0
            while self.inside < self.slots and self.pace.may_enter(self.inside / self.slots):
                self.pace.entered(cost)
                self.inside += 1
                entered += 1
            self.largest_step = max(self.largest_step, entered)
            finished = min(self.inside, self.speed * 0.01)
            self.inside -= finished
            done += finished
            self.pace.finished(finished * cost)
        return done / seconds


def test_without_chats_nothing_is_held_back() -> None:
    """All slots fill in the first step."""
    engine = Engine(speed=100)
    engine.run(0.01)
    assert engine.largest_step == 192


def test_beside_chats_steps_are_short_and_the_engine_is_full_all_the_same() -> None:
    """What finishes sets the pace of what enters."""
    engine = Engine(speed=170)
    engine.run(3)
    engine.largest_step = 0
    engine.pace.chat()
    rate = engine.run(8)
    assert rate > 0.97 * 170
    assert engine.largest_step <= max(MIN_BURST, GROWTH * 170 * BURST_S) + 1


def test_a_batch_that_starts_beside_chats_reaches_the_engines_speed() -> None:
    """From the floor, faster and faster while the engine is not half full."""
    engine = Engine(speed=170)
    for _ in range(2):
        engine.pace.chat()
        engine.run(5)
    engine.pace.chat()
    assert engine.run(4) > 0.97 * 170


def test_while_a_chat_waits_for_its_first_word_a_batch_goes_slower() -> None:
    """A quarter of the rate; afterwards nothing is made up for in a burst."""
    engine = Engine(speed=170)
    engine.run(3)
    engine.pace.chat()
    engine.run(3)
    engine.pace.chat_waits()
    before = engine.inside
    engine.run(0.2)
    assert before - engine.inside > 0.6 * 170 * 0.2
    engine.largest_step = 0
    engine.pace.chat_heard()
    engine.run(1)
    assert engine.largest_step <= max(MIN_BURST, GROWTH * 170 * BURST_S) + 1


def test_even_if_chats_always_wait_a_batch_goes_on() -> None:
    """At a quarter of the floor."""
    engine = Engine(speed=170)
    engine.pace.chat()
    engine.pace.chat_waits()
    assert engine.run(8) >= 0.9 * 32 / 4


def test_costly_prompts_are_spread_out_further() -> None:
    """Nine tiles enter a ninth as often."""
    engine = Engine(speed=25)
    engine.run(3, cost=9)
    engine.largest_step = 0
    engine.pace.chat()
    assert engine.run(8, cost=9) > 0.95 * 25
    assert engine.largest_step == 1


def test_after_the_last_chat_the_pace_is_given_up() -> None:
    """Ten seconds later everything may enter at once."""
    engine = Engine(speed=1)
    engine.pace.chat()
    assert engine.pace.is_kept
    engine.now += CHATTING_S
    assert not engine.pace.is_kept
    assert all(engine.pace.may_enter(0) for _ in range(1000))
