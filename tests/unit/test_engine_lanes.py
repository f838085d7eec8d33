"""Admission: who enters the engine, in which order, and who is turned away."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.inference.engines.lanes import Lanes
from workers.inference.engines.pace import CHATTING_S, HUSH_S
from workers.inference.engines.wire import Lane


def test_chat_overtakes_waiting_batch_prompts() -> None:
    """A chat that comes last starts first."""
    lanes: Lanes[str] = Lanes(max_running=1, max_waiting=10)
    lanes.offer("batch", ["b1", "b2"])
    lanes.offer("chat", ["c1"])
    assert lanes.take() == ["c1"]
    lanes.release("chat", 0.5)
    assert lanes.take() == ["b1"]


def test_a_quarter_of_the_slots_is_for_chat_only() -> None:
    """Batch stops short of it, chat may use every slot."""
    lanes: Lanes[int] = Lanes(max_running=8, max_waiting=100)
    lanes.offer("batch", range(20))
    assert lanes.take() == list(range(6))
    lanes.offer("chat", range(100, 120))
    assert lanes.take() == [100, 101]


def test_chat_may_fill_the_engine() -> None:
    """Without batch work no slot is kept free."""
    lanes: Lanes[int] = Lanes(max_running=8, max_waiting=100)
    lanes.offer("chat", range(20))
    assert len(lanes.take()) == 8


def test_one_slot_is_shared() -> None:
    """A reserve of the only slot would lock batch out."""
    lanes: Lanes[int] = Lanes(max_running=1, max_waiting=1)
    lanes.offer("batch", [1])
    assert lanes.take() == [1]


def test_a_full_batch_lane_leaves_room_for_chat() -> None:
    """Each lane has a bound of its own, beyond what can start at once."""
    lanes: Lanes[int] = Lanes(max_running=4, max_waiting=2)
    assert list(lanes.offer("batch", range(10))) == [5, 6, 7, 8, 9]
    assert list(lanes.offer("chat", range(10))) == [6, 7, 8, 9]


def test_withdrawn_prompts_never_start() -> None:
    """The others keep their order."""
    lanes: Lanes[int] = Lanes(max_running=4, max_waiting=10)
    lanes.offer("batch", range(6))
    assert lanes.withdraw(lambda n: n % 2 == 0) == [0, 2, 4]
    assert lanes.take() == [1, 3, 5]


def test_beside_a_chat_a_batch_enters_by_and_by() -> None:
    """And what waits only for its time is said to be held back."""
    now = [0.0]
    lanes: Lanes[int] = Lanes(max_running=64, max_waiting=100, clock=lambda: now[0])
    lanes.offer("batch", [0])
    lanes.take()
    lanes.release("batch", 3.2)  # so 32 slots make ten a second, and a tenth more
    lanes.offer("chat", [-1])
    lanes.offer("batch", range(1, 30))
    assert lanes.take() == [-1, 1]
    assert lanes.held_back
    assert lanes.take() == []
    now[0] += 0.1
    assert lanes.take() == [2]
    now[0] += CHATTING_S
    assert lanes.take() == list(range(3, 30))
    assert not lanes.held_back


def test_beside_chats_a_batch_has_half_of_the_slots() -> None:
    """Those that are inside stay; and when nobody has chatted for a while it has more again."""
    now = [0.0]
    lanes: Lanes[int] = Lanes(max_running=8, max_waiting=100, clock=lambda: now[0])
    lanes.offer("batch", range(20))
    assert lanes.take() == list(range(6))
    lanes.offer("chat", [-1])
    assert lanes.take() == [-1]
    lanes.release("chat", 0.1)
    for left in (5, 4):
        lanes.release("batch", 0.1)
        now[0] += 1
        assert lanes.take() == [], f"{left} are inside"
        assert not lanes.held_back
    lanes.release("batch", 0.1)
    now[0] += 1
    assert lanes.take() == [6]
    now[0] += CHATTING_S
    assert lanes.take() == [7, 8]


def test_a_chat_that_is_on_its_way_finds_the_door_free() -> None:
    """Announced, it keeps a batch out for a moment, itself it enters at once."""
    now = [0.0]
    lanes: Lanes[int] = Lanes(max_running=64, max_waiting=100, clock=lambda: now[0])
    lanes.chats_wait(1)
    lanes.offer("batch", range(10))
    assert lanes.take() == []
    assert lanes.held_back
    lanes.offer("chat", [-1])
    assert lanes.take() == [-1]
    now[0] += HUSH_S
    assert lanes.take() == [0]
    lanes.chats_wait(0)
    now[0] += CHATTING_S
    assert lanes.take() == list(range(1, 10))


class LanesMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps the bounds and loses nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.lanes: Lanes[tuple[Lane, int]] = Lanes(
            max_running=5, max_waiting=3, clock=lambda: self.now
        )
        self.running: list[tuple[Lane, int]] = []
        self.accepted: dict[Lane, list[tuple[Lane, int]]] = {"chat": [], "batch": []}
        self.number = 0

    @rule(lane=st.sampled_from(["chat", "batch"]), count=st.integers(0, 9))
    def offer(self, lane: Lane, count: int) -> None:
        items = [(lane, self.number + i) for i in range(count)]
        self.number += count
        refused = self.lanes.offer(lane, items)
        assert list(refused) == items[count - len(refused) :]
        self.accepted[lane] += items[: count - len(refused)]

    @rule(count=st.integers(0, 3))
    def chats_wait(self, count: int) -> None:
        self.lanes.chats_wait(count)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1, 20]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        for item in self.lanes.take():
            assert self.accepted[item[0]].pop(0) == item, "a lane is first in, first out"
            self.running.append(item)

    @rule()
    def after_a_long_while_something_enters(self) -> None:
        self.now += 2 * CHATTING_S
        free = self.lanes.running == 0 and self.lanes.waiting > 0
        before = self.lanes.running
        self.take()
        assert self.lanes.running > before or not free

    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        if self.running:
            item = self.running.pop(index % len(self.running))
            self.lanes.release(item[0], 0.5)

    @invariant()
    def bounds_hold(self) -> None:
        assert not self.lanes.held_back or self.accepted["batch"]
        assert self.lanes.running == len(self.running) <= 5
        assert sum(lane == "batch" for lane, _ in self.running) <= 4
        assert self.lanes.waiting == sum(map(len, self.accepted.values()))
        assert all(len(waiting) <= 3 + 5 for waiting in self.accepted.values())


TestLanesMachine = LanesMachine.TestCase
