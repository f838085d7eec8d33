"""Fine-tunes at random: owners, workers, the reaper and a Redis that is lost, in any order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from shared.finetune_store import FinetuneLease, NewEvent
from shared.finetunes import (
    FINETUNE_TERMINAL,
    FINETUNE_TRANSITIONS,
    Finetune,
    FinetuneState,
    Progress,
    Wanted,
)
from shared.metrics import FINETUNES_CREATED, FINETUNES_ENDED, counted
from shared.storage import remove_tree
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.finetune_steps import create, events, now
from tests.state_machines import run_machine

S = FinetuneState
LANES = {S.VALIDATING_FILES: "validate", S.QUEUED: "train"}


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores whose leases end only when the test says so."""
    with connected(store_settings(redis_url, tmp_path)) as found:
        yield found


@dataclasses.dataclass
class Expected:
    """What a job should be, worked out here from the rules in words."""

    gpus: int
    state: FinetuneState = S.VALIDATING_FILES
    wanted: Wanted = "run"
    is_checked: bool = False
    attempts: int = 0
    attempts_on_disk: int = 0
    """Without what the reaper counted since the last claim, which a lost Redis takes with it."""
    step: int = 0
    lease: FinetuneLease | None = None
    steps_told: dict[int, int] = dataclasses.field(default_factory=dict)
    """Each metrics step with the token that told it first."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in FINETUNE_TERMINAL

    def let_go(self) -> None:
        """Nobody holds it: what is wanted comes true."""
        self.lease = None
        if self.state == S.RUNNING:
            self.state = S.QUEUED
        if self.has_ended:
            return
        if self.wanted == "cancel":
            self.state = S.CANCELLED
        elif self.wanted == "pause":
            self.state = S.PAUSED
        elif self.state == S.PAUSED:
            self.state = S.QUEUED if self.is_checked else S.VALIDATING_FILES


class FinetuneMachine(RuleBasedStateMachine):
    """Every rule says what shall come of it; the invariants compare."""

    stores: Stores
    workers = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Finetune] = {}
        self.expected: dict[str, Expected] = {}
        self.late: list[FinetuneLease] = []
        self.ended_in_redis = 0

    @initialize(gpus=st.lists(st.integers(1, 2), min_size=1, max_size=4))
    def begin(self, gpus: list[int]) -> None:
        """Some jobs of two owners."""
        self.stores.redis.flushall()
        for folder in self.stores.layout.finetunes.iterdir():
            remove_tree(folder)
        for number, count in enumerate(gpus):
            job = create(self.stores, owner=("ann", "bob")[number % 2], gpus=count)
            self.jobs[job.id] = job
            self.expected[job.id] = Expected(count)

    @rule(worker=st.sampled_from(workers), kind=st.sampled_from(["validate", "train"]),
          gpus=st.integers(0, 2))  # fmt: skip
    def claim(self, worker: str, kind: Any, gpus: int) -> None:
        """Claim a job: one that waits for this kind of work, if there is any."""
        lease = self.stores.finetunes.claim(kind, worker, gpus)
        waiting = {
            job_id
            for job_id, job in self.expected.items()
            if job.lease is None
            and LANES.get(job.state) == kind
            and (kind == "validate" or job.gpus <= max(1, gpus))
        }
        if lease is None:
            assert not waiting
            return
        assert lease.job_id in waiting
        job = self.expected[lease.job_id]
        assert (lease.attempts, lease.job.progress.step) == (job.attempts, job.step)
        assert all(lease.token > old.token for old in self.late if old.job_id == lease.job_id)
        job.lease = lease
        job.attempts_on_disk = job.attempts

    def held(self) -> list[Expected]:
        """Jobs that somebody holds."""
        return [job for job in self.expected.values() if job.lease is not None]

    def draw(self, data: st.DataObject) -> tuple[Expected, FinetuneLease]:
        """Some held job."""
        job = data.draw(st.sampled_from(self.held()))
        assert job.lease is not None
        return job, job.lease

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        """A holder's renewal is never refused, and says what is wanted."""
        job, lease = self.draw(data)
        assert self.stores.finetunes.renew(lease) == job.wanted

    @precondition(lambda self: self.held())
    @rule(data=st.data(), told=st.integers(1, 6))
    def work(self, data: st.DataObject, told: int) -> None:
        """A holder notes progress and tells steps, some of them again."""
        job, lease = self.draw(data)
        job.step += 1
        self.stores.finetunes.note(lease, progress=Progress(step=job.step))
        event = NewEvent("Step", type="metrics", data={"step": told, "token": lease.token})
        self.stores.finetunes.add_events(lease, [event])
        job.steps_told.setdefault(told, lease.token)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), to=st.sampled_from(FinetuneState), again=st.booleans())
    def move(self, data: st.DataObject, to: FinetuneState, again: bool) -> None:
        """A holder moves the job, perhaps sending it twice; the table forbids the rest."""
        job, lease = self.draw(data)
        if to != job.state and to not in FINETUNE_TRANSITIONS[job.state]:
            with pytest.raises(IllegalTransition):
                self.stores.finetunes.move(lease, to, message="No")
            return
        checked = job.is_checked or to == S.QUEUED
        stage = {"stage": "train" if checked else "validate"}
        for _ in range(1 + again):
            self.stores.finetunes.move(lease, to, message=f"Now {to}", **stage)
        job.state, job.is_checked = to, checked
        if to != S.RUNNING:
            job.let_go()
            self.late.append(lease)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), counts=st.booleans())
    def release(self, data: st.DataObject, counts: bool) -> None:
        """Give a job back."""
        job, lease = self.draw(data)
        self.stores.finetunes.release(lease, counts=counts)
        job.attempts += counts
        job.attempts_on_disk = job.attempts
        job.let_go()
        self.late.append(lease)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """A holder is cut off past its lease."""
        job, lease = self.draw(data)
        member = f"{lease.job_id}|job"
        self.stores.redis.zadd("vlmq:finetune_leases", {member: 1})
        assert self.stores.finetunes.reap() == [member]
        self.lost(job, lease)

    @rule(worker=st.sampled_from(workers))
    def die(self, worker: str) -> None:
        """A worker dies with all it holds."""
        held = [job for job in self.held() if job.lease and job.lease.worker == worker]
        lost = [(job, job.lease) for job in held if job.lease is not None]
        members = {f"{lease.job_id}|job" for _, lease in lost}
        assert set(self.stores.finetunes.reap([worker])) == members
        for job, lease in lost:
            self.lost(job, lease)

    def lost(self, job: Expected, lease: FinetuneLease) -> None:
        """A worker vanished with this job."""
        job.attempts += 1
        job.let_go()
        self.late.append(lease)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def come_too_late(self, data: st.DataObject) -> None:
        """One who lost or gave back a lease gets nowhere with it."""
        lease = data.draw(st.sampled_from(self.late))
        store = self.stores.finetunes
        with pytest.raises(LeaseLost):
            store.renew(lease)
        with pytest.raises(LeaseLost):
            store.note(lease, progress=Progress(step=999))
        with pytest.raises(LeaseLost):
            store.add_events(lease, [NewEvent("late", type="metrics", data={"step": 99})])
        store.release(lease, counts=True)

    @rule(data=st.data(), wanted=st.sampled_from(["run", "pause", "cancel"]))
    def want(self, data: st.DataObject, wanted: Wanted) -> None:
        """The owner wishes something, in whatever state the job is."""
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.expected[job_id]
        repeats_cancel = wanted == "cancel" == job.wanted
        is_over = job.has_ended or job.wanted == "cancel"
        owner = self.jobs[job_id].owner
        if is_over and not (repeats_cancel and job.state in (S.CANCELLED, *LANES, S.RUNNING)):
            if repeats_cancel:
                return  # it ended otherwise before the wish was heard; either answer is right
            with pytest.raises(IllegalTransition):
                self.stores.finetunes.want(owner, job_id, wanted)
            return
        self.stores.finetunes.want(owner, job_id, wanted)
        job.wanted = wanted
        if job.lease is None:
            job.let_go()

    @rule()
    def lose_redis(self) -> None:
        """Redis is wiped and put back; whoever held something finds it taken."""
        self.stores.redis.flushall()
        report = self.stores.rebuild()
        assert (report.finetunes, report.damaged) == (len(self.jobs), [])
        for job in self.expected.values():
            job.attempts = job.attempts_on_disk
            if job.lease is not None:
                self.late.append(job.lease)
                job.let_go()
        self.forget_counts()

    def forget_counts(self) -> None:
        """Counters begin at zero with a new Redis."""
        self.ended_in_redis = -sum(job.has_ended for job in self.expected.values())

    @invariant()
    def jobs_are_as_expected(self) -> None:
        """State, wish, attempts and what was noted; ends have a time."""
        for job_id, job in self.expected.items():
            found = now(self.stores, self.jobs[job_id])
            assert (found.state, found.wanted) == (job.state, job.wanted)
            assert found.progress.step == job.step
            assert (found.finished_at is not None) is job.has_ended
            if not job.has_ended:
                assert found.attempts == job.attempts

    @invariant()
    def disk_says_the_same(self) -> None:
        """What a rebuild would find is what there is, but that nobody holds it."""
        for job_id, job in self.expected.items():
            found = self.stores.finetunes.recorded(job_id)
            assert found is not None
            expected = dataclasses.replace(job)
            if job.lease is not None:
                expected.let_go()
            assert (found.state, found.wanted) == (expected.state, expected.wanted)
            assert found.progress.step == job.step

    @invariant()
    def events_are_numbered_and_told_once(self) -> None:
        """No event of a late worker, and each step by the one who told it first."""
        for job_id, job in self.expected.items():
            found = events(self.stores, self.jobs[job_id])
            assert [event.number for event in found] == list(range(1, len(found) + 1))
            told = [event.data for event in found if event.type == "metrics"]
            assert {data["step"]: data["token"] for data in told} == job.steps_told
            assert len(told) == len(job.steps_told)
            ends = [event for event in found if event.message.startswith("Now succeeded")]
            assert len(ends) == (job.state == S.SUCCEEDED)

    @invariant()
    def leases_and_lanes_match(self) -> None:
        """Held jobs have a lease and wait nowhere; others wait where their state says, once."""
        redis = self.stores.redis
        members = {member.decode() for member in redis.zrange("vlmq:finetune_leases", 0, -1)}
        assert members == {f"{job.lease.job_id}|job" for job in self.held() if job.lease}
        for state, lane in LANES.items():
            queues = redis.scan_iter(f"vlmq:lane:finetune/{lane}|*")
            waiting = [redis.lrange(queue, 0, -1) for queue in queues]
            assert sorted(member.decode() for member in itertools.chain(*waiting)) == sorted(
                job_id
                for job_id, job in self.expected.items()
                if job.lease is None and job.state == state
            )

    @invariant()
    def gauges_match(self) -> None:
        """What is told is what a walk over all jobs finds."""
        gauges = self.stores.gauges.read()
        states = [job.state for job in self.expected.values()]
        assert gauges.finetunes == {state: states.count(S(state)) for state in gauges.finetunes}
        ended = sum(counted(gauges.counters, FINETUNES_ENDED).values())
        assert ended == self.ended_in_redis + sum(job.has_ended for job in self.expected.values())
        created = counted(gauges.counters, FINETUNES_CREATED)
        assert created in ({(): len(self.jobs)}, {})
        users = self.stores.redis.smembers("vlmq:users:file-train")
        live = {job_id for job_id, job in self.expected.items() if not job.has_ended}
        assert {member.decode() for member in users} == live


def test_any_order_of_events_keeps_the_rules(stores: Stores) -> None:
    """One holder at a time, wishes come true, ends are final, disk agrees: see the machine."""

    class Machine(FinetuneMachine):
        pass

    Machine.stores = stores
    run_machine(Machine, examples=40)
