"""Who is in memory: the rules one by one, then any models under any demand on a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.residency import EPSILON, Limits, Plan, Residence, Standing, all_fit, plan

LIMITS = Limits(max_wait_s=60, min_resident_s=30)
NOW = 1000.0


def model(name: str, share: float = 1.0, **fields: Any) -> Standing:
    """An on-demand model on GPU 0."""
    given = {"model": name, "shares": {"0": share}, "on_demand": True}
    return Standing(**{**given, **fields})


def base(name: str, share: float = 1.0) -> Standing:
    """One that would be always loaded, had it not to make room for what was tuned from it."""
    return model(name, share, eager=True)


def loaded(name: str, share: float = 1.0, *, busy: bool = False, **fields: Any) -> Standing:
    """One that is in memory."""
    times = {"since_s": NOW - 100, "used_at_s": NOW - 50}
    return model(name, share, residence=Residence.LOADED, busy=busy, **{**times, **fields})


def wanted(name: str, share: float = 1.0, *, for_s: float = 1, **fields: Any) -> Standing:
    """One that somebody waits for."""
    return model(name, share, wanted_since_s=NOW - for_s, **fields)


@pytest.mark.parametrize(
    ("standings", "load", "unload"),
    [
        pytest.param([model("a", 0.5), model("b", 0.5)], ["a", "b"], {}, id="all fit"),
        pytest.param([model("a"), model("b")], [], {}, id="nothing is wanted"),
        pytest.param(
            [model("a", 0.6, on_demand=False), model("b", 0.4), model("c", 0.4)],
            ["a"],
            {},
            id="always loaded",
        ),
        pytest.param([model("a"), wanted("b")], ["b"], {}, id="wanted, and there is room"),
        pytest.param([base("a")], ["a"], {}, id="a base is loaded unasked"),
        pytest.param(
            [loaded("a", eager=True), wanted("t", tuned=True)],
            [],
            {"a": "t"},
            id="a base makes room for what was tuned from it",
        ),
        pytest.param(
            [base("a"), wanted("t", tuned=True)], ["t"], {}, id="what is wanted goes before a base"
        ),
        pytest.param(
            [base("a"), loaded("t", tuned=True)], [], {}, id="a base waits while it has no room"
        ),
        pytest.param(
            [base("a", 0.5), model("t", 0.5, tuned=True)],
            ["a"],
            {},
            id="a tuned model is not loaded unasked, though it fits",
        ),
        pytest.param(
            [base("a", 0.6), model("x", 0.4), model("t", 0.6, tuned=True)],
            ["a", "x"],
            {},
            id="tuned models do not keep from loading what else fits",
        ),
        pytest.param(
            [wanted("a", for_s=1), wanted("b", for_s=2)], ["b"], {}, id="the longest wanted first"
        ),
        pytest.param([loaded("a"), wanted("b")], [], {"a": "b"}, id="an idle one makes room"),
        pytest.param(
            [
                loaded("a", 0.4, used_at_s=NOW - 10),
                loaded("b", 0.4, used_at_s=NOW - 20),
                wanted("c", 0.4),
            ],
            [],
            {"b": "c"},
            id="the least recently used one",
        ),
        pytest.param(
            [loaded("a", 0.4), loaded("b", 0.4), wanted("c", 0.9)],
            [],
            {"a": "c", "b": "c"},
            id="as many as it takes",
        ),
        pytest.param([loaded("a", busy=True), wanted("b", for_s=59)], [], {}, id="not yet"),
        pytest.param(
            [loaded("a", busy=True), wanted("b", for_s=60)], [], {"a": "b"}, id="its turn"
        ),
        pytest.param(
            [loaded("a", busy=True, since_s=NOW - 29), wanted("b", for_s=90)],
            [],
            {},
            id="not before it was there for a while",
        ),
        pytest.param(
            [
                loaded("a", 0.5, busy=True, since_s=NOW - 40),
                loaded("b", 0.5, busy=True, since_s=NOW - 50),
                wanted("c", 0.5, for_s=60),
            ],
            [],
            {"b": "c"},
            id="the longest loaded first",
        ),
        pytest.param(
            [loaded("a", on_demand=False), wanted("b", for_s=600)], [], {}, id="always is always"
        ),
        pytest.param(
            [loaded("a", may_leave=False), wanted("b", for_s=600)], [], {}, id="being changed"
        ),
        pytest.param([model("a"), wanted("b", may_load=False)], [], {}, id="it just failed"),
        pytest.param(
            [model("a", residence=Residence.LEAVING), wanted("b")], [], {}, id="not gone yet"
        ),
        pytest.param(
            [
                loaded("a", 0.6, busy=True, since_s=NOW),
                wanted("b", 1.0, for_s=61),
                wanted("c", 0.4),
            ],
            [],
            {},
            id="what is overdue keeps younger wishes off",
        ),
        pytest.param(
            [loaded("a", 0.6, busy=True), wanted("b", 1.0, for_s=5), wanted("c", 0.4)],
            ["c"],
            {},
            id="what is not may be overtaken",
        ),
    ],
)
def test_each_rule(standings: list[Standing], load: list[str], unload: dict[str, str]) -> None:
    """One table row per rule."""
    assert plan(standings, NOW, LIMITS) == Plan(load, unload)


def test_what_a_replacement_takes_is_not_free() -> None:
    """While a successor loads beside its predecessor."""
    standings = [loaded("a", 0.4, busy=True), model("x"), wanted("b", 0.4)]
    assert plan(standings, NOW, LIMITS, {"0": 0.4}).load == []
    assert plan(standings, NOW, LIMITS, {}).load == ["b"]


@dataclass
class Simulated:
    """One model of the simulation. It loads and leaves in ``slow_s``; demand comes and goes."""

    standing: Standing
    slow_s: float
    demand: list[bool]
    until_s: float = 0.0
    waited_s: list[float] = field(default_factory=list)


def simulate(models: list[Simulated], limits: Limits, turns: int) -> None:
    """Run the planner on a clock of one-second turns, checking what must never happen."""
    for now in range(turns):
        for simulated in models:
            _advance(simulated, float(now), simulated.demand[now % len(simulated.demand)])
        standings = [simulated.standing for simulated in models]
        found = plan(standings, float(now), limits)
        for simulated in models:
            standing = simulated.standing
            if standing.model in found.load:
                assert standing.residence is Residence.UNLOADED
                simulated.standing = replace(standing, residence=Residence.LOADING)
                simulated.until_s = now + simulated.slow_s
            elif standing.model in found.unload:
                assert standing.residence is Residence.LOADED
                assert standing.on_demand, "what is always loaded is never stopped"
                if standing.busy:
                    assert now - standing.since_s >= limits.min_resident_s
                simulated.standing = replace(standing, residence=Residence.LEAVING)
                simulated.until_s = now + simulated.slow_s
        _check_capacity([simulated.standing for simulated in models])


def _advance(simulated: Simulated, now: float, demand: bool) -> None:
    standing = simulated.standing
    if now >= simulated.until_s:
        if standing.residence is Residence.LOADING:
            standing = replace(standing, residence=Residence.LOADED, since_s=now, used_at_s=now)
        elif standing.residence is Residence.LEAVING:
            standing = replace(standing, residence=Residence.UNLOADED)
    if standing.residence is Residence.LOADED:
        if standing.wanted_since_s is not None:
            simulated.waited_s.append(now - standing.wanted_since_s)
        used_at_s = now if demand else standing.used_at_s
        standing = replace(standing, wanted_since_s=None, busy=demand, used_at_s=used_at_s)
    elif demand and standing.wanted_since_s is None:
        standing = replace(standing, wanted_since_s=now, busy=False)
    simulated.standing = standing


def _check_capacity(standings: list[Standing]) -> None:
    used: dict[str, float] = {}
    for standing in standings:
        if standing.residence is not Residence.UNLOADED:
            for gpu, share in standing.shares.items():
                used[gpu] = used.get(gpu, 0) + share
    assert all(share <= 1 + 10 * EPSILON for share in used.values()), used


SHARES = st.dictionaries(st.sampled_from("01"), st.sampled_from([0.3, 0.5, 0.7]), min_size=1)
MODELS = st.lists(
    st.tuples(SHARES, st.integers(1, 20), st.lists(st.booleans(), min_size=1, max_size=90)),
    min_size=1,
    max_size=5,
)


@given(models=MODELS, always=st.dictionaries(st.sampled_from("01"), st.just(0.3), max_size=2))
@settings(max_examples=150, deadline=None)
def test_every_wanted_model_gets_its_turn(
    models: list[tuple[dict[str, float], int, list[bool]]], always: dict[str, float]
) -> None:
    """Any models, any demand (a wish stays until it is granted): bounds hold all the time.

    A model waits at most until every other one has had its turn: the time it has to wait before it
    may displace, the least time of the one there, and leaving and loading.
    """
    limits = Limits(max_wait_s=10, min_resident_s=5)
    simulated = [
        Simulated(Standing(f"m{i}", shares, on_demand=True), slow, demand)
        for i, (shares, slow, demand) in enumerate(models)
    ]
    if always:
        simulated.append(Simulated(Standing("always", always, on_demand=False), 3, [True]))
    slowest = max(one.slow_s for one in simulated)
    turn_s = limits.max_wait_s + limits.min_resident_s + 2 * slowest + 3
    bound_s = turn_s * (len(simulated) + 1)
    simulate(simulated, limits, turns=600)
    for one in simulated:
        assert all(waited <= bound_s for waited in one.waited_s)
        since = one.standing.wanted_since_s
        assert since is None or 600 - since <= bound_s, "it still waits"
    if always:
        assert simulated[-1].standing.residence is Residence.LOADED


def test_two_busy_models_alternate_without_thrashing() -> None:
    """Each is loaded again and again, and each time stays for the least time at least."""
    limits = Limits(max_wait_s=10, min_resident_s=20)
    pair = [Simulated(Standing(name, {"0": 1.0}, on_demand=True), 2, [True]) for name in "ab"]
    simulate(pair, limits, turns=300)
    turns = [len(one.waited_s) for one in pair]
    assert min(turns) >= 4
    assert max(turns) <= 300 / limits.min_resident_s


def test_whether_all_fit_is_decided_per_gpu() -> None:
    """A full GPU beside an empty one does not fit."""
    both = Standing("a", {"0": 0.6, "1": 0.6}, on_demand=True)
    assert all_fit([both, Standing("b", {"1": 0.4}, on_demand=True)])
    assert not all_fit([both, Standing("b", {"1": 0.5}, on_demand=True)])
