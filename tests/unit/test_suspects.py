"""Finding the items that kill engines, and keeping others out meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import EngineCrashed, EngineError, LeaseLost
from workers.inference import suspects
from workers.inference.engines.base import Answer, Completion, Prompt, Sampling, Turn
from workers.inference.suspects import alone, retry_suspects, together


def prompts(count: int) -> list[Prompt]:
    """Prompts with the ids 0, 1, 2 and so on."""
    return [Prompt(i, [Turn("user", [str(i)])], Sampling(max_tokens=1)) for i in range(count)]


class Engine:
    """Dies whenever one of ``poison`` is in it, and takes the whole group along."""

    def __init__(self, poison: set[int], *, outages: set[int] | None = None) -> None:
        self.poison = poison
        self.outages = outages or set()
        self.runs = 0

    def __call__(self, group: Sequence[Prompt]) -> list[Answer]:
        """Run a group."""
        self.runs += 1
        dies = self.runs in self.outages or any(prompt.id in self.poison for prompt in group)
        return [
            (prompt.id, EngineCrashed() if dies else Completion(str(prompt.id), "stop", 1, 1))
            for prompt in group
        ]


def settled(engine: Engine, count: int) -> tuple[set[int], set[int]]:
    """The ids given up and those answered; each has exactly one verdict."""
    answers = list(retry_suspects(prompts(count), engine))
    assert sorted(prompt_id for prompt_id, _ in answers) == list(range(count))
    bad = {prompt_id for prompt_id, answer in answers if isinstance(answer, EngineCrashed)}
    return bad, {prompt_id for prompt_id, _ in answers} - bad


@given(st.integers(0, 70).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.sets(st.integers(0, count - 1), max_size=5) if count else st.just(set()),
    )
))  # fmt: skip
def test_the_poison_is_found_and_nothing_else(case: tuple[int, set[int]]) -> None:
    """However many there are, wherever they are, with a bounded number of crashes."""
    count, poison = case
    engine = Engine(poison)
    assert settled(engine, count) == (poison, set(range(count)) - poison)
    assert engine.runs <= 2 + len(poison) * (2 * max(1, count).bit_length() + 3)


@pytest.mark.parametrize("outages", [{1}, {2}, {1, 2, 3}, {1, 2, 3, 4}])
def test_a_crash_by_chance_is_blamed_on_nobody(outages: set[int]) -> None:
    """Not even on an item that was alone in the engine then: it is asked once more."""
    assert settled(Engine(set(), outages=outages), 8) == (set(), set(range(8)))


def test_other_errors_are_verdicts() -> None:
    """Only a crash makes a suspect."""

    def run(group: Sequence[Prompt]) -> list[Answer]:
        return [(prompt.id, EngineError("no")) for prompt in group]

    assert [type(answer) for _, answer in retry_suspects(prompts(3), run)] == [EngineError] * 3


def test_when_half_of_a_group_was_answered_only_the_rest_is_suspect() -> None:
    """What came back before the crash stays."""
    asked: list[list[int]] = []

    def run(group: Sequence[Prompt]) -> list[Answer]:
        asked.append([prompt.id for prompt in group])
        return [
            (
                p.id,
                EngineCrashed() if p.id >= 3 and len(asked) == 1 else Completion("", "stop", 1, 1),
            )
            for p in group
        ]

    assert len(list(retry_suspects(prompts(5), run))) == 5
    assert asked == [[0, 1, 2, 3, 4], [3], [4]]


# --- locks ------------------------------------------------------------------------------------


class Actor(threading.Thread):
    """Holds a lock from when it gets it until it is told."""

    def __init__(self, lock: object, path: Path) -> None:
        super().__init__(daemon=True)
        self._lock, self._path = lock, path
        self.got, self.leave = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        """Take it and wait."""
        with self._lock(self._path, lambda: None, _short):  # type: ignore[operator]
            self.got.set()
            self.leave.wait(20)

    def end(self) -> None:
        """Let go."""
        self.leave.set()
        self.join(20)


def _short(_: float) -> None:
    time.sleep(0.005)


def test_chunks_run_together(tmp_path: Path) -> None:
    """Nobody waits for another."""
    path = tmp_path / "run" / "m.lock"
    actors = [Actor(together, path) for _ in range(3)]
    assert all(actor.got.wait(10) for actor in actors)
    for actor in actors:
        actor.end()


def test_the_retrier_is_alone(tmp_path: Path) -> None:
    """It waits for chunks at work; new chunks and other retriers wait for it."""
    path = tmp_path / "m.lock"
    chunk = Actor(together, path)
    assert chunk.got.wait(10)
    retrier = Actor(alone, path)
    assert not retrier.got.wait(0.1)
    later = [Actor(together, path), Actor(alone, path)]
    assert not later[0].got.wait(0.1), "a new chunk overtook the retrier"
    chunk.end()
    assert retrier.got.wait(10)
    assert not any(actor.got.wait(0.05) for actor in later)
    retrier.end()
    for actor in later:
        actor.leave.set()  # whichever of the two comes first
    assert all(actor.got.wait(10) for actor in later)
    for actor in later:
        actor.end()


def test_another_model_has_a_lock_of_its_own(tmp_path: Path) -> None:
    """Its engines are others."""
    retrier = Actor(alone, tmp_path / "one.lock")
    assert retrier.got.wait(10)
    other = Actor(together, tmp_path / "two.lock")
    assert other.got.wait(10)
    retrier.end()
    other.end()


def test_one_who_waits_can_be_stopped(tmp_path: Path) -> None:
    """A cancelled batch does not wait for another's poison."""
    path = tmp_path / "m.lock"
    retrier = Actor(alone, path)
    assert retrier.got.wait(10)

    def stop() -> None:
        raise LeaseLost

    for lock in (alone, together):
        with pytest.raises(LeaseLost), lock(path, stop, _short):
            pytest.fail("got in")
    retrier.end()


def test_a_holder_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on may blame the wrong item; waiting would stop everything."""
    monkeypatch.setattr(suspects, "_CHUNK_PATIENCE_S", 0.05)
    paused = Actor(together, tmp_path / "m.lock")
    assert paused.got.wait(10)
    retrier = Actor(alone, tmp_path / "m.lock")
    assert retrier.got.wait(10)
    retrier.end()
    paused.end()
