"""One model's life on a node, moved on by hand; its engine is a small process of ours."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.models import ModelRecord
from shared.settings import ServeSettings
from workers.inference.engines.standby import Standby
from workers.lending import Loan
from workers.placement import Placement, Seat, seats
from workers.processes import Child, Program
from workers.served_model import ServedModel, Stage, Surroundings

LIMIT_S = 30.0


def broken(folder: Path) -> ServedModel:
    """A model on demand whose engine says at once that it cannot load."""
    entry = ServeSettings(model="m", load="on_demand")

    def make_child(entry: ServeSettings, seat: Seat, record: ModelRecord) -> Child:
        command = (sys.executable, "-c", "import sys; sys.exit(3)")
        return Child(Program("engine", command, folder / "engine.log"))

    around = Surroundings(
        make_child=make_child,
        may_load=lambda _entry, _seat: True,
        loan=lambda _entry, _seat: None,
        has_room=lambda _: True,
        in_hand=lambda _: False,
        say=lambda _: None,
        give_work_s=1.0,
    )
    record = ModelRecord("m", None, "echo", trust_remote_code=False, created=0, owned_by="local")
    return ServedModel(Placement(entry, (Seat(0),)), record, around, Standby(folder, "m"))


def test_a_model_that_failed_to_load_may_be_asked_for_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only chats may want it: refused for ever, it would never be tried again."""
    model = broken(tmp_path)
    model._retry_s = 3600.0  # longer than any test
    model.load()
    ends_at = time.monotonic() + LIMIT_S
    while model.stage is not Stage.UNLOADED and time.monotonic() < ends_at:
        model.tick()
        time.sleep(0.01)
    assert model.trouble
    assert not model.obtainable
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert model.may_load
    assert model.obtainable


RECORD = ModelRecord("m", None, "echo", trust_remote_code=False, created=0, owned_by="local")


@dataclass
class Machine:
    """Two GPUs, some of them lent; a model with a replica on each. Engines are sleeping processes."""

    folder: Path
    load: str = "always"
    lent: set[str] = field(default_factory=set)
    in_hand: bool = False
    room: bool = False
    wait_s: float = 60.0
    lent_at_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        fields = {"model": "m", "gpus": ("0", "1"), "replicas": 2, "load": self.load}
        entry = ServeSettings.model_validate(fields)
        around = Surroundings(
            make_child=self._make_child,
            may_load=lambda entry, seat: self._loan(entry, seat) is None,
            loan=self._loan,
            has_room=lambda _: self.room,
            in_hand=lambda _: self.in_hand,
            say=lambda _: None,
            give_work_s=60.0,
        )
        self.standby = Standby(self.folder, "m")
        self.model = ServedModel(Placement(entry, seats(entry, 2)), RECORD, around, self.standby)

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the model live until something holds."""
        ends_at = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < ends_at, (self.model.stage, self.states)
            self.turn()
            time.sleep(0.005)

    def turn(self) -> None:
        """What the fleet does: what is always loaded is loaded whenever it may be."""
        if self.model.stage is Stage.UNLOADED and self.model.may_load:
            self.model.load()
        self.model.tick()

    @property
    def states(self) -> list[tuple[str, str]]:
        """Each replica's GPU and state."""
        by_number = {r.replica: r.state for r in self.model.reports()}
        seated = [replica.seat for replica in self.model.replicas] or self.model.placement.seats
        placed = {seat.number: seat.visible for seat in (*self.model.placement.seats, *seated)}
        return sorted((placed[number], state) for number, state in by_number.items())

    @property
    def used(self) -> set[str]:
        """GPUs with a process."""
        return {r.seat.visible for r in self.model.replicas if not r.gone}

    def close(self) -> None:
        """End every process."""
        for replica in self.model.replicas:
            if replica.child is not None:
                replica.child.kill()
                replica.child.tick()

    def _loan(self, _entry: ServeSettings, seat: Seat) -> Loan | None:
        lent = [gpu for gpu in seat.gpus if gpu in self.lent]
        return Loan(lent[0], "ftjob-1", self.lent_at_s + self.wait_s) if lent else None

    def _make_child(self, _entry: ServeSettings, _seat: Seat, _record: ModelRecord) -> Child:
        log = self.folder / "engine.log"
        return Child(
            Program(
                "engine", ("sleep", "3600"), log, ready=lambda: True, restart_s=0.01, drain_s=60
            )
        )


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A model with both replicas ready."""
    found = Machine(tmp_path)
    found.until(lambda: found.states == [("0", "ready"), ("1", "ready")])
    yield found
    found.close()


def test_a_replica_leaves_a_lent_gpu_and_the_other_goes_on(machine: Machine) -> None:
    """The model is not on standby meanwhile, and the replica comes back."""
    machine.lent = {"1"}
    machine.until(lambda: machine.states == [("0", "ready"), ("1", "lent")])
    assert machine.used == {"0"}
    assert not machine.standby.is_on()
    assert machine.model.settled
    machine.lent = set()
    machine.until(lambda: machine.states == [("0", "ready"), ("1", "ready")])


def test_with_every_gpu_lent_work_in_hand_is_finished_first(machine: Machine) -> None:
    """Nothing new is claimed from the start, and the reason is told."""
    machine.in_hand = True
    machine.lent = {"0", "1"}
    for _ in range(5):
        machine.turn()
    assert machine.used == {"0", "1"}
    assert machine.standby.lent() == "GPU 0 is lent to fine-tune ftjob-1"
    assert not machine.model.obtainable
    machine.in_hand = False
    machine.until(lambda: machine.states == [("0", "lent"), ("1", "lent")])
    assert machine.used == set()
    machine.lent = {"1"}
    machine.turn()
    assert machine.model.obtainable, "requests may wait for it again"
    machine.until(lambda: machine.states == [("0", "ready"), ("1", "lent")])
    assert not machine.standby.is_on()


def test_work_in_hand_is_waited_for_no_longer_than_the_borrower_waits(machine: Machine) -> None:
    """Whoever trains has a limit of its own."""
    machine.in_hand = True
    machine.wait_s = 0.0
    machine.lent = {"0", "1"}
    machine.until(lambda: machine.used == set())


def test_a_model_that_makes_room_hurries_when_its_gpus_are_lent(machine: Machine) -> None:
    """And says so to those who wait."""
    machine.in_hand = True
    machine.model.retire("it makes room for another")
    machine.turn()
    assert machine.standby.lent() == ""
    machine.wait_s = 0.0
    machine.lent = {"0", "1"}
    machine.until(lambda: machine.used == set())
    assert "ftjob-1" in machine.standby.lent()


def test_a_new_revision_meanwhile_is_what_comes_back(machine: Machine) -> None:
    """Given one linked while all GPUs were lent, then only that is loaded."""
    machine.lent = {"0", "1"}
    machine.until(lambda: machine.model.stage is Stage.UNLOADED)
    newer = msgspec.structs.replace(RECORD, revision=2)
    machine.model.renew(newer)
    machine.lent = set()
    machine.until(lambda: machine.states == [("0", "ready"), ("1", "ready")])
    assert {replica.record.revision for replica in machine.model.replicas} == {2}


STEPS = st.lists(
    st.sampled_from(["lend 0", "lend 1", "return 0", "return 1", "renew", "die", "turns"]),
    max_size=14,
)


@given(steps=STEPS, room=st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_happens_lent_gpus_are_left_and_all_replicas_come_back(
    steps: list[str], room: bool
) -> None:
    """Loans, new revisions and deaths in any order: no seat is lost, none is there twice."""
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(Path(name), room=room)
        try:
            for step in steps:
                _take(machine, step)
            machine.until(lambda: not machine.used & machine.lent)
            for _ in range(5):
                machine.turn()
                assert not machine.used & machine.lent
            machine.lent = set()
            latest = machine.model.latest
            machine.until(
                lambda: (
                    [r.record for r in machine.model.replicas if r.ready] == [latest, latest]
                    and not machine.model.changing
                )
            )
            assert sorted(r.seat.visible for r in machine.model.replicas) == ["0", "1"]
            assert len({r.seat.number for r in machine.model.replicas}) == 2
            assert not machine.standby.is_on()
        finally:
            machine.close()


def _take(machine: Machine, step: str) -> None:
    match step.split():
        case ["lend", gpu]:
            machine.lent = {*machine.lent, gpu}
        case ["return", gpu]:
            machine.lent = machine.lent - {gpu}
        case ["renew"]:
            latest = machine.model.latest
            machine.model.renew(msgspec.structs.replace(latest, revision=latest.revision + 1))
        case ["die"]:
            living = [r.child for r in machine.model.replicas if r.ready and r.child is not None]
            if living:
                living[0].condemn("the test killed it")
        case _:
            for _ in range(5):
                machine.turn()
    machine.turn()
