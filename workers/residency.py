"""Which models should be in memory now: a pure function of what is wanted and what there is.

Knows nothing of processes, Redis or GPUs' real memory: models have shares of named GPUs, a share of
a model that is not fully gone is still taken, and time is a number. The rules, in this order:

1. Models that are always loaded are loaded and never stopped.
2. A wanted model is loaded where there is room; the one wanted longest comes first.
3. If there is none, idle models make room, the least recently used first.
4. A model wanted for longer than ``max_wait_s`` keeps younger wishes off its GPUs and has busy
   models stopped, those loaded longest first, but none before it was loaded for
   ``min_resident_s``. So two busy models alternate.
5. What room is then left is for eager models, which are always loaded but for having to make room;
   and if everything configured fits, for all of that. Tuned models are loaded only when wanted.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

EPSILON = 1e-6


class Residence(enum.StrEnum):
    """Where a model is between disk and memory."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Standing:
    """One model: what it takes and how it is. Times are seconds of one clock.

    ``since_s`` is when it was loaded, ``used_at_s`` when it last had or was wanted for work.
    ``may_load`` is false while it is not worth trying, ``may_leave`` while it is being changed.
    ``eager`` and ``tuned`` are of rule 5.
    """

    model: str
    shares: Mapping[str, float]
    on_demand: bool
    residence: Residence = Residence.UNLOADED
    since_s: float = 0.0
    used_at_s: float = 0.0
    busy: bool = False
    wanted_since_s: float | None = None
    may_load: bool = True
    may_leave: bool = True
    eager: bool = False
    tuned: bool = False


@dataclass(frozen=True)
class Limits:
    """The bounds of ``node.max_model_wait_s`` and ``node.min_resident_s``, in seconds."""

    max_wait_s: float
    min_resident_s: float


@dataclass
class Plan:
    """Models to load and models to stop, each of the latter with the model it makes room for."""

    load: list[str] = field(default_factory=list)
    unload: dict[str, str] = field(default_factory=dict)


def all_fit(standings: Iterable[Standing]) -> bool:
    """Whether everything configured may be in memory at once."""
    total: dict[str, float] = {}
    for standing in standings:
        for gpu, share in standing.shares.items():
            total[gpu] = total.get(gpu, 0) + share
    return all(share <= 1 + EPSILON for share in total.values())


def plan(
    standings: Iterable[Standing],
    now_s: float,
    limits: Limits,
    taken: Mapping[str, float] | None = None,
) -> Plan:
    """What to do now; ``taken`` is what is in use beyond the models' own shares, by GPU."""
    found = list(standings)
    room = _Room(found, taken or {})
    plan = Plan()
    _fill((standing for standing in found if not standing.on_demand), room, plan)
    for standing in sorted(found, key=_wanted_since):
        if standing.wanted_since_s is None or standing.model in plan.load:
            continue
        if _can_load(standing) and standing.on_demand:
            _make_room(standing, found, room, plan, now_s, limits)
    configured = [standing for standing in found if not standing.tuned]
    _fill(configured if all_fit(configured) else (s for s in found if s.eager), room, plan)
    return plan


def _fill(standings: Iterable[Standing], room: _Room, plan: Plan) -> None:
    """Load those for which there is room, wanted or not."""
    for standing in standings:
        due = _can_load(standing) and standing.model not in plan.load
        if due and room.fits(standing):
            room.take(standing)
            plan.load.append(standing.model)


def _make_room(
    wish: Standing,
    found: list[Standing],
    room: _Room,
    plan: Plan,
    now_s: float,
    limits: Limits,
) -> None:
    if room.fits(wish):
        room.take(wish)
        plan.load.append(wish.model)
        return
    assert wish.wanted_since_s is not None
    overdue = now_s - wish.wanted_since_s >= limits.max_wait_s
    leaving = [other for other in found if other.residence is Residence.LEAVING]
    candidates = [
        other
        for other in found
        if other.on_demand
        and other.may_leave
        and other.residence is Residence.LOADED
        and other.model not in plan.unload
    ]
    victims = _idle(candidates)
    if overdue:
        victims += _settled(candidates, now_s, limits)
    chosen = room.clear_for(wish, [*leaving, *_named(found, plan.unload)], victims)
    if chosen is not None:
        plan.unload.update(dict.fromkeys((other.model for other in chosen), wish.model))
    if chosen is not None or overdue:
        room.take(wish)


def _can_load(standing: Standing) -> bool:
    return standing.residence is Residence.UNLOADED and standing.may_load


def _wanted_since(standing: Standing) -> float:
    return float("inf") if standing.wanted_since_s is None else standing.wanted_since_s


def _named(found: list[Standing], names: Iterable[str]) -> list[Standing]:
    chosen = set(names)
    return [standing for standing in found if standing.model in chosen]


def _idle(candidates: list[Standing]) -> list[Standing]:
    """Models without work, the least recently used first."""
    return sorted((c for c in candidates if not c.busy), key=lambda c: c.used_at_s)


def _settled(candidates: list[Standing], now_s: float, limits: Limits) -> list[Standing]:
    """Models with work that had their time, those loaded longest first."""
    settled = (c for c in candidates if c.busy and now_s - c.since_s >= limits.min_resident_s)
    return sorted(settled, key=lambda c: c.since_s)


class _Room:
    """What is free on each GPU, with what is promised taken off."""

    def __init__(self, standings: list[Standing], taken: Mapping[str, float]) -> None:
        self._free: dict[str, float] = {}
        for gpu in {gpu for standing in standings for gpu in standing.shares}:
            self._free[gpu] = 1.0 - taken.get(gpu, 0.0)
        for standing in standings:
            if standing.residence is not Residence.UNLOADED:
                self.take(standing)

    def take(self, standing: Standing) -> None:
        """Promise a model its share; below zero others are kept off until that is paid back."""
        for gpu, share in standing.shares.items():
            self._free[gpu] -= share

    def fits(self, standing: Standing) -> bool:
        """Whether the model could be loaded now."""
        return not self._short(standing, self._free)

    def clear_for(
        self, wish: Standing, leaving: list[Standing], victims: list[Standing]
    ) -> list[Standing] | None:
        """The victims to stop, in order and no more than needed; None if all would not do."""
        free = dict(self._free)
        for standing in leaving:
            _give_back(free, standing)
        chosen: list[Standing] = []
        for victim in victims:
            short = self._short(wish, free)
            if not short:
                break
            if short & victim.shares.keys():
                chosen.append(victim)
                _give_back(free, victim)
        return None if self._short(wish, free) else chosen

    def _short(self, standing: Standing, free: Mapping[str, float]) -> set[str]:
        """The GPUs that lack room for it."""
        return {gpu for gpu, share in standing.shares.items() if free[gpu] < share - EPSILON}


def _give_back(free: dict[str, float], standing: Standing) -> None:
    for gpu, share in standing.shares.items():
        free[gpu] += share
