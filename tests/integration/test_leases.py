"""Leases and fencing on a real Valkey: who gets which work, and what a late worker may still do."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shared.errors import IllegalTransition, LeaseLost
from shared.jobs import Batch, BatchState
from shared.leases import CONTROL_LANE, FINAL, PLAN, Lease
from shared.metrics import BATCH_ITEMS, counted
from shared.shards import ShardHeader
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import numbered
from tests.state_machines import run_machine
from tests.stored_batches import (
    LANE,
    MODEL,
    claim,
    commit,
    jsonl,
    link_model,
    now,
    planned,
    record,
    run_control,
    write,
)
from workers.inference.control import plan
from workers.keeper import Keeper

SMALL = {"queue": {"chunk_items": 1, "lease_ttl_s": 30, "renew_s": 1}}


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Stores:
    """Stores that cut a chunk for each line."""
    with connected(store_settings(redis_url, tmp_path, **SMALL)) as found:
        yield found


def let_expire(stores: Stores, lease: Lease) -> None:
    """Make a lease's time be over."""
    stores.redis.zadd("vlmq:leases", {f"{lease.batch_id}|{lease.unit}": 1})


# --- who is next ------------------------------------------------------------------------------


def test_owners_take_turns_however_many_batches_one_has(stores: Stores) -> None:
    """An owner with 100 batches gets every other chunk while another has one."""
    link_model(stores)
    for _ in range(100):
        record(stores, jsonl(numbered(2)), owner="many")
    record(stores, jsonl(numbered(20)), owner="one")
    run_control(stores, times=101)
    owners = [claim(stores).spec.owner for _ in range(40)]
    assert owners.count("one") == 20
    assert all(pair[0] != pair[1] for pair in itertools.pairwise(owners))


def test_an_owners_batches_take_turns(stores: Stores) -> None:
    """A long batch does not hold up a short one of the same owner."""
    long = planned(stores, 30)
    short = planned(stores, 3)
    claimed = [claim(stores).batch_id for _ in range(6)]
    assert claimed.count(long.id) == claimed.count(short.id) == 3


def test_what_is_left_goes_to_whoever_has_work(stores: Stores) -> None:
    """Turns are offered, not reserved."""
    planned(stores, 2, owner="ann")
    planned(stores, 6, owner="bob")
    owners = [claim(stores).spec.owner for _ in range(8)]
    assert (owners.count("ann"), owners.count("bob")) == (2, 6)
    assert stores.leases.claim(LANE, "w") is None


def test_owners_take_turns_on_the_control_lane_too(stores: Stores) -> None:
    """One who submits a hundred batches does not keep another's from being planned."""
    link_model(stores)
    for _ in range(20):
        record(stores, jsonl(numbered(1)), owner="many")
    mine = record(stores, jsonl(numbered(1)), owner="one")
    run_control(stores, times=2)
    assert now(stores, mine).state == BatchState.IN_PROGRESS


def test_demand_counts_what_could_be_claimed(stores: Stores) -> None:
    """Chunks held, done or put off are not in it, and it stops counting at the limit."""
    batch = planned(stores, 6)
    assert stores.leases.demand(LANE, limit=100) == 6
    assert stores.leases.demand(LANE, limit=4) == 4
    commit(stores, claim(stores))
    held = claim(stores)
    stores.leases.release(claim(stores), delay_s=60)
    assert stores.leases.demand(LANE, limit=100) == 3
    stores.batches.stop(batch.id, "cancelled")
    assert stores.leases.demand(LANE, limit=100) == 0
    stores.leases.release(held)
    assert stores.leases.demand(CONTROL_LANE, limit=100) == 1


def test_a_delayed_unit_comes_back_after_its_delay(stores: Stores) -> None:
    """And not before."""
    planned(stores, 1)
    stores.leases.release(claim(stores), delay_s=0.3, warning="storage_full")
    assert stores.leases.claim(LANE, "w") is None
    time.sleep(0.35)
    assert claim(stores).unit == "0"


# --- fencing ----------------------------------------------------------------------------------


@pytest.fixture
def overtaken(stores: Stores) -> tuple[Lease, Lease]:
    """A lease that expired, and the one that another worker has on the same chunk."""
    planned(stores, 2)
    old = claim(stores, "slow")
    let_expire(stores, old)
    assert stores.leases.reap() == [f"{old.batch_id}|{old.unit}"]
    return old, claim(stores, "quick")


def test_the_next_holder_has_a_higher_token_and_sees_the_attempt(
    overtaken: tuple[Lease, Lease],
) -> None:
    """So that its shard's name is another and poison is noticed."""
    old, new = overtaken
    assert (new.batch_id, new.unit) == (old.batch_id, old.unit)
    assert new.token > old.token
    assert (old.attempts, new.attempts) == (0, 1)


def test_an_old_token_renews_commits_and_releases_nothing(
    stores: Stores, overtaken: tuple[Lease, Lease]
) -> None:
    """Whatever the late worker does, the new holder's lease stands."""
    old, new = overtaken
    with pytest.raises(LeaseLost):
        stores.leases.renew(old)
    with pytest.raises(LeaseLost):
        commit(stores, old)
    stores.leases.release(old, warning="storage_full", counts=True)
    batch = stores.batches.get("ann", new.batch_id)
    assert (batch.completed, batch.warning) == (0, None)
    assert stores.leases.renew(new) is None
    commit(stores, new)
    with pytest.raises(LeaseLost):
        commit(stores, old)
    assert stores.batches.get("ann", new.batch_id).completed == 1


def test_a_commit_whose_answer_was_lost_may_be_repeated(stores: Stores) -> None:
    """The same token again is no error and counts once."""
    batch = planned(stores, 2)
    lease = claim(stores)
    header = write(stores, lease)
    stores.batches.committed(lease, header, [])
    stores.batches.committed(lease, header, [])
    assert now(stores, batch).completed == 1
    assert not stores.redis.zcard("vlmq:leases")


def test_an_overtaken_planner_changes_nothing(stores: Stores) -> None:
    """It may neither start nor fail the batch."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(3)))
    old = stores.leases.claim(CONTROL_LANE, "slow")
    assert old is not None
    let_expire(stores, old)
    stores.leases.reap()
    run_control(stores)
    chunk = claim(stores)
    with pytest.raises(LeaseLost):
        stores.batches.rejected(old, 0, [])
    plan(old, stores, Keeper(stores.leases, renew_s=5))  # late, and finds it done
    assert now(stores, batch).state == BatchState.IN_PROGRESS
    assert stores.leases.renew(chunk) is None


# --- reaping ----------------------------------------------------------------------------------


def test_a_lease_that_is_renewed_is_not_reaped(stores: Stores) -> None:
    """Only those whose time is over are."""
    planned(stores, 2)
    kept, lost = claim(stores), claim(stores)
    let_expire(stores, kept)
    stores.leases.renew(kept)
    let_expire(stores, lost)
    assert stores.leases.reap() == [f"{lost.batch_id}|{lost.unit}"]
    assert stores.leases.reap() == []


def test_what_a_dead_worker_held_is_taken_back_at_once(stores: Stores) -> None:
    """And nothing of what others hold."""
    planned(stores, 3)
    dead, alive = claim(stores, "dead"), claim(stores, "alive")
    assert stores.leases.reap(["dead", "unheard-of"]) == [f"{dead.batch_id}|{dead.unit}"]
    with pytest.raises(LeaseLost):
        stores.leases.renew(dead)
    assert stores.leases.renew(alive) is None
    assert stores.leases.reap(["dead"]) == []


def test_dead_workers_keep_nothing_of_what_they_gave_back(stores: Stores) -> None:
    """A chunk that was released and claimed by another stays the other's."""
    planned(stores, 1)
    stores.leases.release(claim(stores, "dead"))
    other = claim(stores, "alive")
    assert stores.leases.reap(["dead"]) == []
    assert stores.leases.renew(other) is None


# --- stopping ---------------------------------------------------------------------------------


def test_a_batch_that_nobody_holds_stops_at_once(stores: Stores) -> None:
    """What was committed is kept, the rest is not offered any more."""
    batch = planned(stores, 3)
    commit(stores, claim(stores))
    stores.batches.stop(batch.id, "cancelled")
    assert now(stores, batch).state == BatchState.FINALIZING
    assert stores.leases.claim(LANE, "w") is None
    final = stores.leases.claim(CONTROL_LANE, "w")
    assert final is not None
    assert final.unit == FINAL


def test_a_batch_in_work_stops_when_the_last_one_lets_go(stores: Stores) -> None:
    """Each holder hears of it with its next renewal."""
    batch = planned(stores, 3)
    first, second = claim(stores), claim(stores)
    stores.batches.stop(batch.id, "cancelled")
    assert stores.leases.claim(LANE, "w") is None
    assert stores.leases.renew(first) == stores.leases.renew(second) == "cancelled"
    stores.leases.release(first)
    assert now(stores, batch).state == BatchState.IN_PROGRESS
    assert commit(stores, second), "the last commit ends the work"
    assert now(stores, batch).state == BatchState.FINALIZING


def test_a_batch_whose_last_holder_died_stops_when_it_is_reaped(stores: Stores) -> None:
    """Cancelling needs nobody's help."""
    batch = planned(stores, 2)
    lease = claim(stores, "dead")
    stores.batches.stop(batch.id, "expired")
    assert stores.leases.renew(lease) == "expired"
    stores.leases.reap(["dead"])
    assert now(stores, batch).state == BatchState.FINALIZING


@pytest.mark.parametrize("is_held", [False, True])
def test_a_batch_that_was_not_planned_yet_stops(stores: Stores, is_held: bool) -> None:
    """Also while somebody plans it: the plan is recorded, no chunk is offered."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(3)))
    lease = stores.leases.claim(CONTROL_LANE, "w") if is_held else None
    stores.batches.stop(batch.id, "cancelled")
    if lease is not None:
        assert now(stores, batch).state == BatchState.VALIDATING
        plan(lease, stores, Keeper(stores.leases, renew_s=5))
    assert now(stores, batch).state == BatchState.FINALIZING
    run_control(stores)
    ended = now(stores, batch)
    assert ended.state == BatchState.CANCELLED
    assert ended.failed == (3 if is_held else 0)


def test_the_first_reason_to_stop_stays(stores: Stores) -> None:
    """Cancelled and expired in one: it was cancelled."""
    batch = planned(stores, 2)
    claim(stores)
    stores.batches.stop(batch.id, "cancelled")
    stores.batches.stop(batch.id, "expired")
    assert now(stores, batch).stop_reason == "cancelled"


def test_finalizing_is_not_stopped_any_more(stores: Stores) -> None:
    """Everything is done; the deadline that passes meanwhile is forgotten."""
    batch = planned(stores, 1)
    assert commit(stores, claim(stores))
    stores.redis.zadd("vlmq:deadlines", {batch.id: 1})
    assert stores.batches.overdue() == [batch.id]
    stores.batches.stop(batch.id, "expired")
    assert stores.batches.overdue() == []
    assert now(stores, batch).stop_reason is None


def test_a_batch_is_finalized_once(stores: Stores) -> None:
    """One final unit is offered, whatever else happens."""
    batch = planned(stores, 2)
    first, second = claim(stores), claim(stores)
    assert not commit(stores, first)
    assert commit(stores, second)
    stores.batches.stop(batch.id, "cancelled")
    assert stores.leases.claim(CONTROL_LANE, "w") is not None
    assert stores.leases.claim(CONTROL_LANE, "w") is None


# --- all of it at random ----------------------------------------------------------------------


class LeaseMachine(RuleBasedStateMachine):
    """Workers that claim, renew, commit, give up, die and come too late, in any order."""

    stores: Stores
    workers = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.batches: dict[str, Batch] = {}
        self.held: list[Lease] = []
        self.late: list[Lease] = []
        self.committed: dict[tuple[str, str], Lease] = {}
        self.ended: dict[str, BatchState] = {}
        self.worker_of: dict[tuple[str, int], str] = {}

    @initialize(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
    def begin(self, sizes: list[int]) -> None:
        """Some batches of two owners."""
        self.stores.redis.flushall()
        for number, size in enumerate(sizes):
            batch = planned(self.stores, size, owner=("ann", "bob")[number % 2])
            self.batches[batch.id] = batch

    @rule(worker=st.sampled_from(workers))
    def claim(self, worker: str) -> None:
        """Claim a chunk: never one that is held, committed, or of a stopped batch."""
        lease = self.stores.leases.claim(LANE, worker)
        if lease is None:
            return
        unit = (lease.batch_id, lease.unit)
        assert unit not in self.committed
        assert unit not in {(held.batch_id, held.unit) for held in self.held}
        assert self._batch(lease.batch_id).stop_reason is None
        self.held.append(lease)
        self.worker_of[lease.batch_id, lease.token] = worker

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """A holder's renewal is never refused."""
        lease = data.draw(st.sampled_from(self.held))
        assert self.stores.leases.renew(lease) == self._batch(lease.batch_id).stop_reason

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.booleans())
    def commit(self, data: st.DataObject, again: bool) -> None:
        """A holder's commit counts, and once even if it is sent twice."""
        lease = self._take(data)
        assert (lease.batch_id, lease.unit) not in self.committed
        self.committed[lease.batch_id, lease.unit] = lease
        for _ in range(1 + again):
            self.stores.batches.committed(lease, _ONE, [])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Give a chunk back."""
        lease = self._take(data)
        self.stores.leases.release(lease)
        self.late.append(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """A holder is cut off past its lease."""
        lease = self._take(data)
        let_expire(self.stores, lease)
        assert self.stores.leases.reap() == [f"{lease.batch_id}|{lease.unit}"]
        self.late.append(lease)

    @rule(worker=st.sampled_from(workers))
    def die(self, worker: str) -> None:
        """A worker dies with all it holds."""
        taken = set(self.stores.leases.reap([worker]))
        lost = [
            lease for lease in self.held if self.worker_of[lease.batch_id, lease.token] == worker
        ]
        assert taken == {f"{lease.batch_id}|{lease.unit}" for lease in lost}
        self.held = [lease for lease in self.held if lease not in lost]
        self.late += lost

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def come_too_late(self, data: st.DataObject) -> None:
        """One who lost a lease gets nowhere with it."""
        lease = data.draw(st.sampled_from(self.late))
        with pytest.raises(LeaseLost):
            self.stores.batches.committed(lease, _ONE, [])
        with pytest.raises(LeaseLost):
            self.stores.leases.renew(lease)
        self.stores.leases.release(lease)

    @rule(data=st.data(), reason=st.sampled_from(["cancelled", "expired"]))
    def stop(self, data: st.DataObject, reason: str) -> None:
        """Ask a batch to stop, in whatever state it is."""
        batch_id = data.draw(st.sampled_from(sorted(self.batches)))
        try:
            self.stores.batches.stop(batch_id, reason)  # type: ignore[arg-type]
        except IllegalTransition:
            assert self._batch(batch_id).is_terminal

    @rule()
    def finalize(self) -> None:
        """End a batch that has nothing left to do."""
        lease = self.stores.leases.claim(CONTROL_LANE, "f")
        if lease is None:
            return
        assert lease.unit == FINAL
        assert lease.batch_id not in self.ended
        batch = self._batch(lease.batch_id)
        state = BatchState(batch.stop_reason or "completed")
        self.stores.batches.finished(
            lease,
            state,
            output_file_id=None,
            error_file_id=None,
            completed=batch.completed,
            failed=batch.failed,
        )
        self.ended[lease.batch_id] = state

    @invariant()
    def counters_match(self) -> None:
        """Each committed chunk counts once."""
        for batch_id in self.batches:
            done = sum(1 for owner_id, _ in self.committed if owner_id == batch_id)
            assert self._batch(batch_id).completed == done

    @invariant()
    def an_end_is_final(self) -> None:
        """A batch that ended stays as it ended, in no lane, with nothing held."""
        for batch_id, state in self.ended.items():
            assert self._batch(batch_id).state == state
        waiting = {
            member.decode()
            for name in self.stores.redis.scan_iter("vlmq:lane:*")
            for member in self.stores.redis.lrange(name, 0, -1)
        }
        assert not waiting & set(self.ended)
        members = {member.decode() for member in self.stores.redis.zrange("vlmq:leases", 0, -1)}
        assert members == {f"{lease.batch_id}|{lease.unit}" for lease in self.held}

    @invariant()
    def gauges_match(self) -> None:
        """What is counted as waiting and held is what a walk over all batches finds."""
        found = [self._batch(batch_id) for batch_id in self.batches]
        running = [batch for batch in found if batch.state == BatchState.IN_PROGRESS]
        left = {
            batch.id: batch.chunks
            - sum(1 for owner_id, _ in self.committed if owner_id == batch.id)
            - sum(1 for lease in self.held if lease.batch_id == batch.id)
            for batch in running
            if batch.stop_reason is None
        }
        gauges = self.stores.gauges.read()
        lane = gauges.lanes[MODEL]
        assert lane.waiting == sum(left.values())
        assert lane.waiting == self.stores.leases.demand(LANE, limit=10_000)
        assert lane.held == len(self.held) == gauges.leases_held
        assert gauges.control.waiting == sum(1 for b in found if b.state == BatchState.FINALIZING)
        waiting = {batch_id.encode() for batch_id, count in left.items() if count}
        for index in ("created", "touched"):
            assert set(self.stores.redis.zrange(f"vlmq:{index}:{LANE}", 0, -1)) == waiting
        assert gauges.batches == {
            state: sum(1 for batch in found if batch.state == state) for state in gauges.batches
        }
        items = counted(gauges.counters, BATCH_ITEMS)
        assert items.get((MODEL, "completed"), 0) == len(self.committed)

    @invariant()
    def what_is_all_done_is_finalized_and_nothing_else(self) -> None:
        """A batch without work left never waits, one with work left ends only when stopped."""
        for batch_id, batch in self.batches.items():
            done = sum(1 for owner_id, _ in self.committed if owner_id == batch_id)
            found = self._batch(batch_id)
            if found.stop_reason is None or done == batch.total:
                goes_on = found.state == BatchState.IN_PROGRESS
                assert goes_on is (done < batch.total)

    def _take(self, data: st.DataObject) -> Lease:
        lease = data.draw(st.sampled_from(self.held))
        self.held.remove(lease)
        return lease

    def _batch(self, batch_id: str) -> Batch:
        return self.stores.batches.get(self.batches[batch_id].owner, batch_id)


_ONE = ShardHeader(0, 0, 1, 0, 0, 0)


def test_any_order_of_events_keeps_the_rules(stores: Stores) -> None:
    """Chunks commit once, counters match, ends are final: see the machine's rules."""

    class Machine(LeaseMachine):
        pass

    Machine.stores = stores
    run_machine(Machine, examples=50)


def test_a_fresh_batch_offers_its_plan(stores: Stores) -> None:
    """Nothing else of it can be claimed yet."""
    link_model(stores)
    record(stores, jsonl(numbered(1)))
    first = stores.leases.claim(CONTROL_LANE, "w")
    assert first is not None
    assert first.unit == PLAN
    assert stores.leases.claim(CONTROL_LANE, "w") is None
