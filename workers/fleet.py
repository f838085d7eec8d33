"""The engines of a node: who is loaded, on which GPU, one load at a time per GPU.

The fleet gathers what the planner (``residency``) needs to know and does what it says; each model's
own life is in ``served_model``. Driven by ``tick`` from the node's thread; reports may be asked for
from another. See docs/decisions/0016-engine-fleet.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from shared.models import ModelRecord
from shared.presence import ReplicaReport
from shared.settings import ServeSettings, Settings
from workers import residency
from workers.inference.engines.standby import Standby
from workers.inference.engines.wire import socket_path
from workers.inference.suspects import engines_lock, in_use
from workers.lending import Lending, Loan
from workers.lookout import Lookout
from workers.placement import Placement, Seat, gpus_of, place_like, takes_any_gpu
from workers.processes import Child, Program, State
from workers.pulse import Pulse, Target
from workers.residency import Limits, Standing
from workers.served_model import Replica, ServedModel, Surroundings
from workers.serving import Served, serve_now

PLAN_EVERY_S = 0.25
IDLE_S = 2.0
"""A model without work for so long is idle; between two chunks it is not."""
WISH_S = 2.0
"""How long a chat request's mark counts after it was last renewed."""

MakeProgram = Callable[[ServeSettings, Seat, ModelRecord, Callable[[], bool]], Program]
"""The program of a replica; the callable says whether it may start again now."""


class Fleet:
    """All served models of this node."""

    def __init__(
        self,
        settings: Settings,
        placements: list[Placement],
        records: Mapping[str, ModelRecord],
        *,
        make_program: MakeProgram,
        tell: Callable[[Child], None],
        say: Callable[[str], object],
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self._settings = settings
        self._make_program = make_program
        self._tell = tell
        self._limits = Limits(settings.node.max_model_wait_s, settings.node.min_resident_s)
        self._pulse = Pulse()
        self._lending = Lending(settings.run_dir, wait_s=settings.finetune.lend_wait_s)
        self._plan_at_s = 0.0
        self._say = say
        self._changed = changed
        self._placed = {placement.entry.model: placement for placement in placements}
        self._around = Surroundings(
            make_child=self._make_child,
            may_load=self._may_load,
            loan=self._loan,
            has_room=self._has_room,
            in_hand=self._in_hand,
            say=say,
            give_work_s=settings.api.request_timeout_s,
        )
        self.models: list[ServedModel] = []
        self._lookout = Lookout(settings, records)
        self._records: Mapping[str, ModelRecord] | None = None
        self._renew()
        self._renew_loans()

    # --- what the node sees ---

    @property
    def children(self) -> list[Child]:
        """Every engine process."""
        return [
            replica.child
            for model in self.models
            for replica in model.replicas
            if replica.child is not None
        ]

    @property
    def settled(self) -> bool:
        """Whether everything is ready that should be."""
        return all(model.settled for model in self.models)

    def reports(self) -> list[ReplicaReport]:
        """How every replica is."""
        return [report for model in self.models for report in model.reports()]

    def obtainable(self) -> list[str]:
        """Models that a request brings, or that are being replaced."""
        return [model.name for model in self.models if model.obtainable]

    def lent(self) -> dict[str, str]:
        """Models that had to leave for fine-tunes, each with the reason."""
        return {model.name: model.lent for model in self.models if model.lent}

    # --- its life ---

    def tick(self) -> None:
        """Look after everything."""
        self._end_silent()
        now_s = time.monotonic()
        if now_s >= self._plan_at_s:
            self._plan_at_s = now_s + PLAN_EVERY_S
            self._renew()
            self._renew_loans()
            self._plan(now_s)
        for model in self.models:
            model.tick()
        self._drop()
        self._lending.tell(self._gpus(), self._used_gpus())

    def tick_children(self) -> None:
        """While the node stops: start again what dies, but load and replace nothing."""
        for model in self.models:
            model.tick_children()

    def stop(self, limit_s: float) -> None:
        """Ask every engine to finish within ``limit_s``; those that wait to load do not start."""
        for child in self.children:
            child.stop(limit_s)

    def close(self) -> None:
        """Stop looking at engines, Redis and records."""
        self._pulse.close()
        self._lookout.close()

    # --- what models ask for ---

    def _make_child(self, entry: ServeSettings, seat: Seat, record: ModelRecord) -> Child:
        # A model that was linked anew may have another engine than its entry had.
        entry = entry.model_copy(update={"engine": record.engine})
        program = self._make_program(entry, seat, record, lambda: self._may_load(entry, seat))
        return Child(program, self._tell)

    def _may_load(self, entry: ServeSettings, seat: Seat) -> bool:
        """Free memory is measured while loading, so only one engine at a time loads on a GPU."""
        return self._loan(entry, seat) is None and not any(
            replica.loading and not set(replica.seat.gpus).isdisjoint(seat.gpus)
            for model in self.models
            for replica in model.replicas
        )

    def _has_room(self, seat: Seat) -> bool:
        taken = self._extra()
        for model in self.models:
            if model.residence is not residency.Residence.UNLOADED:
                for gpu, share in model.placement.shares.items():
                    taken[gpu] = taken.get(gpu, 0.0) + share
        share = seat.share or 0.0
        return all(taken.get(gpu, 0.0) + share <= 1 + residency.EPSILON for gpu in seat.gpus)

    def _in_hand(self, model: str) -> bool:
        return in_use(engines_lock(self._settings.run_dir, model))

    # --- GPUs lent to training ---

    def _renew_loans(self) -> None:
        before = self._lending.loans.keys()
        self._lending.look(self._gpus())
        if before != self._lending.loans.keys():
            self._changed()

    def _loan(self, entry: ServeSettings, seat: Seat) -> Loan | None:
        """The first loan of a GPU that the replica would use."""
        gpus = self._gpus() if takes_any_gpu(entry) else seat.gpus
        loans = self._lending.loans
        return next((loans[gpu] for gpu in gpus if gpu in loans), None)

    def _gpus(self) -> tuple[str, ...]:
        """Every GPU that is named for fine-tunes or engines."""
        engines = (gpu for model in self.models for gpu in gpus_of(model.placement.entry))
        return tuple(dict.fromkeys((*self._settings.finetune.gpus, *engines)))

    def _used_gpus(self) -> set[str]:
        """Every GPU on which a process of an engine is left."""
        used: set[str] = set()
        for model in self.models:
            everywhere = takes_any_gpu(model.placement.entry)
            for replica in model.replicas:
                if not replica.gone:
                    used.update(self._gpus() if everywhere else replica.seat.gpus)
        return used

    # --- residency ---

    def _renew(self) -> None:
        """Serve what the registry says now."""
        records = self._lookout.records
        if records == self._records:
            return
        self._records = records
        served = serve_now(self._settings.node.serve, records)
        for model in self.models:
            if model.name in served and not model.dismissed:
                one = served[model.name]
                model.placement = replace(model.placement, entry=one.entry)
                model.renew(one.build)
            elif not model.dismissed:
                model.dismiss("it is not served here any more")
        present = {model.name for model in self.models}
        self.models = [
            *self.models,
            *(self._newcomer(one) for name, one in served.items() if name not in present),
        ]
        self._lookout.watch(model.name for model in self.models if model.on_demand)
        self._changed()

    def _newcomer(self, one: Served) -> ServedModel:
        placement = self._placed.get(one.name) or place_like(one.entry, self._placed.get(one.root))
        return ServedModel(
            replace(placement, entry=one.entry),
            one.build,
            self._around,
            Standby(self._settings.run_dir, one.name),
            eager=one.eager,
            tuned=one.tuned,
        )

    def _drop(self) -> None:
        """Forget models that have left for good; one that was linked again begins anew."""
        left = [model for model in self.models if model.dropped]
        if not left:
            return
        for model in left:
            # A chunk that was claimed too late is given up at once, not when no engine has come.
            model.stand_by()
            self._say(f"  {model.name} is not served any more")
        self.models = [model for model in self.models if not model.dropped]
        self._records = None
        self._changed()

    def _plan(self, now_s: float) -> None:
        standings = [self._standing(model, now_s) for model in self.models]
        plan = residency.plan(standings, now_s, self._limits, self._extra())
        by_name = {model.name: model for model in self.models}
        for name in plan.load:
            by_name[name].load()
        for name, wish in plan.unload.items():
            by_name[name].retire(f"it makes room for {wish}")

    def _standing(self, model: ServedModel, now_s: float) -> Standing:
        wanted = model.name in self._lookout.wanted or model.standby.wanted_age_s() < WISH_S
        loaded = model.residence is residency.Residence.LOADED
        if loaded or not wanted:
            model.wanted_since_s = None
        elif model.wanted_since_s is None:
            model.wanted_since_s = now_s
        if wanted or (loaded and model.on_demand and self._works(model)):
            model.used_at_s = now_s
        return Standing(
            model=model.name,
            shares=model.placement.shares,
            on_demand=model.on_demand,
            residence=model.residence,
            since_s=model.loaded_at_s,
            used_at_s=model.used_at_s,
            busy=now_s - model.used_at_s < IDLE_S,
            wanted_since_s=model.wanted_since_s,
            may_load=model.may_load,
            may_leave=not model.changing,
            eager=model.eager,
            tuned=model.tuned,
        )

    def _works(self, model: ServedModel) -> bool:
        busy = any(self._pulse.busy(target) for target in self._targets(model))
        return busy or self._in_hand(model.name)

    def _extra(self) -> dict[str, float]:
        taken: dict[str, float] = {}
        for model in self.models:
            for seat in model.extra:
                for gpu in seat.gpus:
                    taken[gpu] = taken.get(gpu, 0.0) + (seat.share or 0.0)
        return taken

    # --- engines that hang ---

    def _end_silent(self) -> None:
        limit_s = self._settings.node.engine_silence_s
        self._end_unloadable()
        self._pulse.watch(target for model in self.models for target in self._targets(model))
        for model in self.models:
            for replica in model.replicas:
                target = self._target(model, replica)
                if target is not None and self._pulse.silent_s(target) > limit_s:
                    assert replica.child is not None
                    replica.child.condemn(f"hung: it said nothing for {limit_s:g} s")

    def _end_unloadable(self) -> None:
        limit_s = self._settings.node.load_limit_s
        for child in self.children:
            if child.state is State.STARTING and time.monotonic() - child.started_at > limit_s:
                child.condemn(f"hung: it was not loaded after {limit_s:g} s")

    def _targets(self, model: ServedModel) -> list[Target]:
        found = (self._target(model, replica) for replica in model.replicas)
        return [target for target in found if target is not None]

    def _target(self, model: ServedModel, replica: Replica) -> Target | None:
        child = replica.child
        # One that hangs while it stops is found out sooner than by its long drain limit.
        if child is None or child.state not in {State.READY, State.STOPPING} or child.pid is None:
            return None
        path = socket_path(self._settings.run_dir, model.name, replica.seat.number)
        return path, child.pid
