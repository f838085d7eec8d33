"""One served model on this node: its replicas loaded, replaced by a new revision, and unloaded.

Moved on by ``tick`` from the node's thread. It decides nothing about other models: the fleet says
when to load and to leave, and whether a GPU is free to load on.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.models import ModelRecord
from shared.presence import ReplicaReport, ReplicaState
from shared.settings import ServeSettings
from workers.inference.engines.standby import Standby
from workers.lending import Loan
from workers.placement import Placement, Seat
from workers.processes import Child, State
from workers.residency import Residence

CRASHES_TO_REFUSE = 2
"""Restarts without ever getting ready after which a load has failed."""
FIRST_RETRY_S = 30.0
LONGEST_RETRY_S = 600.0
LAST_GRACE_S = 5.0
"""What an engine on a lent GPU gets to stop in when its time to finish is over."""

_REPORTED: dict[State, ReplicaState] = {
    State.STARTING: "starting",
    State.READY: "ready",
    State.RESTARTING: "restarting",
    State.FAILED: "failed",
    State.STOPPING: "stopping",
    State.STOPPED: "stopping",
}


class Stage(enum.StrEnum):
    """Where the model as a whole is; the table is in docs/decisions/0016-engine-fleet.md."""

    UNLOADED = "unloaded"
    """No process."""
    LOADING = "loading"
    """Processes start; none has been ready."""
    LOADED = "loaded"
    """At least one has been ready."""
    RETIRING = "retiring"
    """On standby: chunks in hand are finished, nothing new is claimed."""
    UNLOADING = "unloading"
    """Processes finish their requests and end."""


@dataclass(eq=False)
class Replica:
    """One engine process, or one that waits for its turn to load."""

    seat: Seat
    record: ModelRecord
    child: Child | None = None
    was_ready: bool = False
    leaving: bool = False
    """Its GPU was lent."""

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.child is not None and self.child.state is State.READY

    @property
    def loading(self) -> bool:
        """Whether it takes memory right now."""
        return self.child is not None and self.child.state is State.STARTING

    @property
    def gone(self) -> bool:
        """Whether there is no process."""
        return self.child is None or self.child.state is State.STOPPED

    @property
    def broken(self) -> bool:
        """Whether it is down and not by request."""
        return self.child is not None and self.child.state in {State.RESTARTING, State.FAILED}

    @property
    def hopeless(self) -> bool:
        """Whether loading it has failed, rather than been interrupted."""
        if self.child is None or self.was_ready:
            return False
        if self.child.state is State.FAILED:
            return True
        return self.child.state is State.RESTARTING and self.child.restarts >= CRASHES_TO_REFUSE


@dataclass(frozen=True)
class Surroundings:
    """What a model asks the fleet for. ``give_work_s`` bounds how long chunks in hand are awaited."""

    make_child: Callable[[ServeSettings, Seat, ModelRecord], Child]
    may_load: Callable[[ServeSettings, Seat], bool]
    loan: Callable[[ServeSettings, Seat], Loan | None]
    has_room: Callable[[Seat], bool]
    in_hand: Callable[[str], bool]
    say: Callable[[str], object]
    give_work_s: float


@dataclass
class _Change:
    """A replica on its way to a new revision; ``old`` is stopped before, or after, ``fresh`` loads."""

    record: ModelRecord
    old: Replica
    fresh: Replica | None = None
    successor: bool = False
    undoing: bool = False


@dataclass
class ServedModel:
    """See the module. Times are of ``time.monotonic``."""

    placement: Placement
    latest: ModelRecord
    around: Surroundings
    standby: Standby
    stage: Stage = Stage.UNLOADED
    replicas: list[Replica] = field(default_factory=list)
    loaded_at_s: float = 0.0
    used_at_s: float = 0.0
    wanted_since_s: float | None = None
    eager: bool = False
    """Loaded without being asked for, where there is room."""
    tuned: bool = False
    """Served because its base is."""
    dismissed: bool = False
    """Not to be served any more."""
    trouble: str = ""
    """Why the model, or its newest revision, is not loaded."""
    _good: ModelRecord | None = None
    """The revision that was loaded last."""
    _trying: ModelRecord | None = None
    _refused: ModelRecord | None = None
    _next: ModelRecord | None = None
    """What to load as soon as the present processes are gone."""
    _change: _Change | None = None
    _why: str = ""
    _retire_by_s: float = 0.0
    _away: list[Seat] = field(default_factory=list)
    """Seats whose GPU is lent, while others work."""
    _standing_by: str | None = None
    """What the standby file says; None without one."""
    _retry_at_s: float = 0.0
    _retry_s: float = FIRST_RETRY_S

    def __post_init__(self) -> None:
        # An earlier run may have been killed while the model was unloaded.
        if self.on_demand:
            self.stand_by()
        else:
            self._stand_up()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.placement.entry.model

    @property
    def on_demand(self) -> bool:
        """Whether it may be unloaded."""
        return self.placement.entry.load == "on_demand"

    @property
    def residence(self) -> Residence:
        """How the planner sees it: a model that is being replaced keeps its place."""
        if self.stage is Stage.UNLOADED:
            return Residence.UNLOADED
        if self.dismissed:
            return Residence.LEAVING
        if self.stage is Stage.LOADED:
            return Residence.LOADED
        if self.stage is Stage.LOADING or self._next is not None:
            return Residence.LOADING
        return Residence.LEAVING

    @property
    def lent(self) -> str:
        """Why none of its engines may work, if that is because GPUs are lent; else empty."""
        loans = [self._loan(seat) for seat in self.placement.seats]
        return loans[0].reason if loans[0] is not None and all(loans) else ""

    @property
    def may_load(self) -> bool:
        """Whether loading is worth a try."""
        if self.dismissed or self.lent:
            return False
        return time.monotonic() >= self._retry_at_s

    @property
    def changing(self) -> bool:
        """Whether a new revision is being put in place."""
        return self._change is not None or self._next is not None

    @property
    def obtainable(self) -> bool:
        """Whether a request that comes now may expect an engine soon, if none is ready."""
        if self.dismissed or self.lent:
            return False
        if self.changing:
            return True
        # What is always loaded stands by when it comes back, its GPU having been lent.
        comes = self.on_demand or self._standing_by is not None
        if self.stage is Stage.UNLOADED:
            # What failed once is tried again when its time has come, and only requests ask for it.
            return comes and (not self.trouble or self.may_load)
        return comes and self.stage is not Stage.LOADED

    @property
    def settled(self) -> bool:
        """Whether it is as it should be: ready, or unloaded on purpose."""
        if self.stage is Stage.UNLOADED:
            return True
        return self.stage is Stage.LOADED and all(replica.ready for replica in self.replicas)

    @property
    def extra(self) -> list[Seat]:
        """Seats in use beyond the model's own share."""
        change = self._change
        if change is not None and change.successor and change.fresh is not None:
            return [change.fresh.seat]
        return []

    # --- what the fleet asks for ---

    def load(self) -> None:
        """Begin to load."""
        if self.on_demand:
            self.stand_by()
        self._begin(self._best())

    def retire(self, why: str) -> None:
        """Begin to leave, work in hand first."""
        self._why = why
        self.around.say(f"  {self.name} is being unloaded: {why}")
        self._abandon_change()
        self.stand_by(self.lent)
        self._retire_by_s = time.monotonic() + self.around.give_work_s
        self.stage = Stage.RETIRING

    def dismiss(self, why: str) -> None:
        """Begin to leave for good, work in hand first; ``dropped`` says when that is done."""
        self.dismissed = True
        if self.stage is Stage.LOADED:
            self.retire(why)
            return
        self._abandon_change()
        if self.stage is Stage.LOADING:
            self._why = why
            self._stop_replicas()

    @property
    def dropped(self) -> bool:
        """Whether nothing is left of a model that was dismissed."""
        return self.dismissed and self.stage is Stage.UNLOADED

    def renew(self, record: ModelRecord) -> None:
        """The registry's record is this now."""
        if record == self.latest:
            return
        self.latest = record
        self.trouble, self._retry_at_s, self._retry_s = "", 0.0, FIRST_RETRY_S

    def tick(self) -> None:
        """Move on."""
        for replica in list(self.replicas):
            self._move(replica)
        self._follow_loans()
        match self.stage:
            case Stage.LOADING:
                self._watch_loading()
            case Stage.LOADED:
                self._roll()
            case Stage.RETIRING:
                in_hand = self.around.in_hand(self.name)
                if not in_hand or time.monotonic() >= self._retire_by_s:
                    self._stop_replicas()
            case Stage.UNLOADING:
                if all(replica.gone for replica in self.replicas):
                    self._unloaded()
            case Stage.UNLOADED:
                pass

    def tick_children(self) -> None:
        """Only look after the processes there are, while the node stops."""
        for replica in self.replicas:
            if replica.child is not None:
                replica.child.tick()

    def reports(self) -> list[ReplicaReport]:
        """How each replica is, the ones that are not loaded too."""
        replicas = list(self.replicas)
        if not replicas:
            state: ReplicaState = "failed" if self.trouble else "unloaded"
            detail = self.trouble or "loaded when somebody asks for it"
            if self.lent:
                state, detail = "lent", self.lent
            return [
                ReplicaReport(self.name, seat.number, state, detail=detail)
                for seat in self.placement.seats
            ]
        away = [
            ReplicaReport(self.name, seat.number, "lent", detail=loan.reason)
            for seat in self._away
            if (loan := self._loan(seat)) is not None
        ]
        return [*(self._report(replica) for replica in replicas), *away]

    # --- loading ---

    def _begin(self, record: ModelRecord) -> None:
        self._trying = record
        self._away = [seat for seat in self.placement.seats if self._loan(seat) is not None]
        here = (seat for seat in self.placement.seats if seat not in self._away)
        self.replicas = [Replica(seat, record) for seat in here]
        self.stage = Stage.LOADING

    def _best(self) -> ModelRecord:
        """The revision to load now."""
        refused = self.latest == self._refused and self._good is not None
        return self._good if refused and self._good is not None else self.latest

    def _move(self, replica: Replica) -> None:
        if replica.child is not None:
            replica.child.tick()
            replica.was_ready = replica.was_ready or replica.ready
        elif self.stage in {Stage.LOADING, Stage.LOADED} and self.around.may_load(
            self.placement.entry, replica.seat
        ):
            replica.child = self.around.make_child(
                self.placement.entry, replica.seat, replica.record
            )
            replica.child.try_to_start()

    def _watch_loading(self) -> None:
        if any(replica.ready for replica in self.replicas):
            self._loaded()
            return
        broken = [replica for replica in self.replicas if replica.broken]
        if broken and self.latest not in {self._trying, self._refused}:
            # Whoever linked it anew means to mend it.
            self._next = self.latest
            self._stop_replicas()
            return
        hopeless = [replica for replica in self.replicas if replica.hopeless]
        if not hopeless:
            return
        reason = _reason(hopeless[0])
        if self._good is not None and self._trying != self._good:
            self._refuse(reason)
            self._next = self._good
            self._stop_replicas()
        elif self.on_demand:
            self.trouble = reason
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(LONGEST_RETRY_S, 2 * self._retry_s)
            self.around.say(f"  {self.name} could not be loaded: {reason}")
            self._stop_replicas()

    def _loaded(self) -> None:
        self._good = self._trying
        self.loaded_at_s = self.used_at_s = time.monotonic()
        self._retry_s = FIRST_RETRY_S
        if self._refused is None:
            self.trouble = ""
        self._stand_up()
        self.stage = Stage.LOADED

    # --- leaving ---

    def _stop_replicas(self) -> None:
        for replica in self.replicas:
            if replica.child is not None:
                replica.child.stop()
        self.stage = Stage.UNLOADING

    def _unloaded(self) -> None:
        self.replicas, self._away = [], []
        if self._next is not None and not self.lent:
            record, self._next = self._next, None
            self._begin(record)
        else:
            self._next = None
            self.stage = Stage.UNLOADED

    def stand_by(self, lent: str = "") -> None:
        """Have consumers of this machine know that the engines are away."""
        self.standby.begin(lent)
        self._standing_by = lent

    def _stand_up(self) -> None:
        self.standby.end()
        self._standing_by = None

    # --- GPUs lent to training ---

    def _loan(self, seat: Seat) -> Loan | None:
        return self.around.loan(self.placement.entry, seat)

    def _follow_loans(self) -> None:
        """Leave the GPUs that are lent, and come back to those that are given back."""
        lent = self.lent
        if self.stage in {Stage.LOADING, Stage.LOADED}:
            if lent:
                self._leave(lent)
            else:
                self._give_seats()
                self._take_seats()
        self._hurry()
        stands_by = self._standing_by is not None or self.stage is Stage.UNLOADED
        if stands_by and (self._standing_by or "") != lent:
            self.stand_by(lent)

    def _leave(self, lent: str) -> None:
        """No GPU is left: batches wait from now on."""
        if self.stage is Stage.LOADED:
            self.retire(lent)
            return
        self._why = lent
        self._abandon_change()
        self.stand_by(lent)
        self._stop_replicas()

    def _give_seats(self) -> None:
        """Other replicas go on with the work of those that leave."""
        for replica in list(self.replicas):
            loan = self._loan(replica.seat)
            if loan is not None and not replica.leaving:
                self._give(replica, loan)
            # Also if its GPU was given back while it stopped: then it takes its seat again at once.
            if replica.leaving and replica.gone:
                self._drop(replica)
                # A successor on its way has no seat of its own.
                taken = len(self.replicas) + len(self._away) - len(self.extra)
                if taken < len(self.placement.seats):
                    self._away.append(replica.seat)

    def _give(self, replica: Replica, loan: Loan) -> None:
        if self._change is not None and replica in {self._change.old, self._change.fresh}:
            self._change = None
        replica.leaving = True
        self._why = loan.reason
        if not replica.gone:
            self.around.say(f"  {self.name}/{replica.seat.number} leaves: {loan.reason}")
            self._part_with(replica)

    def _take_seats(self) -> None:
        if self._change is not None:
            return
        back = [seat for seat in self._away if self._loan(seat) is None]
        if back:
            self._away = [seat for seat in self._away if seat not in back]
            self.replicas = [*self.replicas, *(Replica(seat, self._best()) for seat in back)]

    def _hurry(self) -> None:
        """Whatever an engine stops for, a lent GPU is not waited for longer than its borrower."""
        for replica in self.replicas:
            loan = self._loan(replica.seat)
            if loan is None:
                continue
            if self.stage is Stage.RETIRING:
                self._retire_by_s = min(self._retire_by_s, loan.until_s)
            elif replica.child is not None and replica.child.state is State.STOPPING:
                replica.child.stop(max(LAST_GRACE_S, loan.until_s - time.monotonic()))

    # --- a new revision ---

    def _roll(self) -> None:
        if self._change is not None:
            self._go_on(self._change)
            return
        if self.latest == self._refused:
            return
        staying = [replica for replica in self.replicas if not replica.leaving]
        outdated = [replica for replica in staying if replica.record != self.latest]
        if not staying:
            return
        if not outdated:
            self._good, self.trouble, self._refused = self.latest, "", None
            return
        # Those that are down first: replacing them costs nothing.
        old = min(outdated, key=lambda replica: replica.ready)
        if old.loading:
            return
        others_ready = any(replica.ready for replica in staying if replica is not old)
        successor = Seat(self._free_number(), old.seat.gpus, old.seat.share)
        if old.ready and not others_ready and not self.around.has_room(successor):
            self._swap()
        elif old.ready and not others_ready:
            fresh = Replica(successor, self.latest)
            self.replicas = [*self.replicas, fresh]
            self._change = _Change(self.latest, old, fresh, successor=True)
        else:
            self._part_with(old)
            self._change = _Change(self.latest, old)

    def _go_on(self, change: _Change) -> None:
        fresh = change.fresh
        if fresh is None:
            if change.old.gone:
                change.fresh = Replica(change.old.seat, change.record)
                self._put(change.old, change.fresh)
                if change.undoing:
                    self._change = None
        elif fresh.hopeless:
            self._refuse(_reason(fresh), change.record)
            self._part_with(fresh)
            if change.successor:
                self._drop(fresh)
                self._change = None
            else:
                self._change = _Change(change.old.record, fresh, undoing=True)
        elif fresh.ready:
            if not change.successor or change.old.gone:
                self._drop(change.old)
                self._change = None
            elif change.old.child is not None and change.old.child.state is not State.STOPPING:
                self._part_with(change.old)

    def _swap(self) -> None:
        """One replica and no room for two: requests wait until the new one is there."""
        self._next = self.latest
        self._why = f"it is replaced by revision {self.latest.revision}"
        self.stand_by()
        self._retire_by_s = time.monotonic() + self.around.give_work_s
        self.stage = Stage.RETIRING

    def _refuse(self, reason: str, record: ModelRecord | None = None) -> None:
        self._refused = refused = record or self._trying
        assert refused is not None
        self.trouble = f"revision {refused.revision} could not be loaded: {reason}"
        self.around.say(f"  {self.name}: {self.trouble}; what was loaded before stays")

    def _abandon_change(self) -> None:
        self._change = None
        self._next = None

    def _part_with(self, replica: Replica) -> None:
        if replica.child is not None:
            replica.child.stop()

    def _put(self, old: Replica, fresh: Replica) -> None:
        self.replicas = [fresh if replica is old else replica for replica in self.replicas]

    def _drop(self, gone: Replica) -> None:
        self.replicas = [replica for replica in self.replicas if replica is not gone]

    def _free_number(self) -> int:
        used = {seat.number for seat in (*(r.seat for r in self.replicas), *self._away)}
        return next(number for number in range(len(used) + 1) if number not in used)

    def _report(self, replica: Replica) -> ReplicaReport:
        child = replica.child
        if child is None:
            waits = "waits until its GPU is free to load on"
            return ReplicaReport(self.name, replica.seat.number, "starting", detail=waits)
        state = _REPORTED[child.state]
        detail = child.detail
        if self.stage is Stage.RETIRING and state == "ready":
            state, detail = "stopping", self._why
        elif state == "ready":
            detail = self.trouble
        elif state == "stopping":
            detail = detail or self._why
        return ReplicaReport(
            self.name, replica.seat.number, state, child.pid, child.restarts, detail
        )


def _reason(replica: Replica) -> str:
    assert replica.child is not None
    return replica.child.detail
