"""Fine-tunes on a real Valkey and a real folder: who gets which job, and what may be said of it."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.errors import (
    FileInUse,
    IllegalTransition,
    InvalidValue,
    LeaseLost,
    NotFound,
    StorageFull,
)
from shared.finetune_folder import FinetuneFolder
from shared.finetune_store import FinetuneLease, NewEvent
from shared.finetunes import DataSource, FinetuneCheckpoint, FinetuneState, Progress
from shared.queue import FINETUNE_QUEUE
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.finetune_steps import claim, create, events, messages, now, queued, running, spec
from tests.stored_batches import upload

S = FinetuneState


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores without a node."""
    with connected(store_settings(redis_url, tmp_path)) as found:
        yield found


def let_expire(stores: Stores, lease: FinetuneLease) -> None:
    """Make a lease's time be over."""
    stores.redis.zadd("vlmq:finetune_leases", {f"{lease.job_id}|{lease.unit}": 1})


def metrics(step: int, **data: Any) -> NewEvent:
    """A metrics event."""
    return NewEvent(f"Step {step}", type="metrics", data={"step": step, **data})


# --- for the API ------------------------------------------------------------------------------


def test_a_new_job_waits_to_be_validated(stores: Stores) -> None:
    """It is as it was asked for, announced, listed and has an event."""
    asked = spec(suffix="food", metadata={"a": "null"})
    job = stores.finetunes.create(asked)
    assert (job.state, job.stage, job.wanted) == (S.VALIDATING_FILES, "validate", "run")
    assert {name: getattr(job, name) for name in asked.__struct_fields__} == msgspec.structs.asdict(
        asked
    )
    assert stores.finetunes.list("ann").items == [job]
    assert messages(stores, job) == ["Created; its data waits to be checked"]
    assert stores.tickets.waiting(FINETUNE_QUEUE) == 1


def test_somebody_elses_job_is_as_absent_as_a_missing_one(stores: Stores) -> None:
    """Whatever is asked of it."""
    job = create(stores)
    for owner, job_id in (("bob", job.id), ("ann", "ftjob-none"), ("ann", "../../etc")):
        for ask in (
            lambda owner=owner, job_id=job_id: stores.finetunes.get(owner, job_id),
            lambda owner=owner, job_id=job_id: stores.finetunes.want(owner, job_id, "cancel"),
            lambda owner=owner, job_id=job_id: stores.finetunes.events(owner, job_id),
            lambda owner=owner, job_id=job_id: stores.finetunes.request_checkpoint(
                owner, job_id, 1
            ),
        ):
            with pytest.raises(NotFound):
                ask()
    assert now(stores, job) == job


def test_jobs_are_listed_newest_first_by_pages_and_metadata(stores: Stores) -> None:
    """Pairs that a job does not have leave it out."""
    jobs = []
    for number in range(5):
        jobs.append(create(stores, metadata={"parity": str(number % 2), "all": "yes"}))
        time.sleep(0.002)
    create(stores, owner="bob")
    newest = jobs[::-1]
    page = stores.finetunes.list("ann", limit=2)
    assert (page.items, page.has_more) == (newest[:2], True)
    page = stores.finetunes.list("ann", limit=3, after=newest[1].id)
    assert (page.items, page.has_more) == (newest[2:], False)
    odd = stores.finetunes.list("ann", metadata={"parity": "1", "all": "yes"}, limit=1)
    assert (odd.items, odd.has_more) == ([jobs[3]], True)
    assert stores.finetunes.list("ann", metadata={"parity": "2"}).items == []
    with pytest.raises(InvalidValue):
        stores.finetunes.list("ann", after="ftjob-none")


def test_events_are_paged_newest_first(stores: Stores) -> None:
    """By their numbers, which stay what they are."""
    lease = running(stores)
    stores.finetunes.add_events(lease, [metrics(step) for step in range(1, 8)])
    found = events(stores, lease.job)
    assert [event.number for event in found] == list(range(1, 11))
    assert [event.data.get("step") for event in found[3:]] == [1, 2, 3, 4, 5, 6, 7]
    first = stores.finetunes.events("ann", lease.job_id, limit=4)
    assert (first.items, first.has_more) == (found[:-5:-1], True)
    rest = stores.finetunes.events("ann", lease.job_id, limit=6, after=first.items[-1].number)
    assert (rest.items, rest.has_more) == (found[5::-1], False)
    for wrong in (0, 11):
        with pytest.raises(InvalidValue):
            stores.finetunes.events("ann", lease.job_id, after=wrong)


def test_a_job_for_which_there_is_no_room_leaves_nothing(redis_url: str, tmp_path: Path) -> None:
    """Neither on disk nor in Redis."""
    settings = store_settings(redis_url, tmp_path, storage={"min_free_bytes": 1 << 60})
    with connected(settings) as stores:
        with pytest.raises(StorageFull):
            create(stores)
        assert list(stores.layout.finetunes.iterdir()) == []
        assert stores.redis.keys("vlmq:*finetune*") == []


def test_a_job_without_a_folder_is_forgotten_by_whoever_claims_it(stores: Stores) -> None:
    """Its creation failed when Redis had heard of it, or somebody deleted the folder."""
    gone, other = create(stores), create(stores)
    shutil.rmtree(stores.finetunes.path(gone.id))
    assert claim(stores, "validate").job_id == other.id
    with pytest.raises(NotFound):
        now(stores, gone)
    assert stores.redis.keys(f"vlmq:*{gone.id}*") == []
    assert stores.gauges.read().finetunes["validating_files"] == 1
    assert stores.redis.smembers("vlmq:users:file-train") == {other.id.encode()}


# --- pause, resume, cancel ----------------------------------------------------------------------


def test_a_job_that_nobody_holds_follows_at_once(stores: Stores) -> None:
    """Paused, resumed and cancelled; a pause before the data was checked is resumed there."""
    job = create(stores)
    assert stores.finetunes.want("ann", job.id, "pause").state == S.PAUSED
    assert stores.finetunes.claim("validate", "w") is None
    assert stores.finetunes.want("ann", job.id, "run").state == S.VALIDATING_FILES
    stores.finetunes.move(claim(stores, "validate"), S.QUEUED, message="Good", stage="train")
    assert stores.finetunes.want("ann", job.id, "pause").state == S.PAUSED
    assert stores.finetunes.claim("train", "w") is None
    assert stores.finetunes.want("ann", job.id, "run").state == S.QUEUED
    cancelled = stores.finetunes.want("ann", job.id, "cancel")
    assert cancelled.state == S.CANCELLED
    assert cancelled.finished_at is not None
    assert stores.finetunes.claim("train", "w") is None
    assert [text.split(";")[0] for text in messages(stores, job)] == [
        "Created",
        "Paused",
        "Resumed",
        "Good",
        "Paused",
        "Resumed",
        "Cancelled",
    ]


@pytest.mark.parametrize(("wanted", "state"), [("pause", S.PAUSED), ("cancel", S.CANCELLED)])
def test_a_held_job_follows_when_its_holder_lets_go(
    stores: Stores, wanted: Any, state: FinetuneState
) -> None:
    """The holder hears of it with its renewal, and its worker's death is as good."""
    moved, released, died = (running(stores, worker=name) for name in "abc")
    for lease in (moved, released, died):
        assert stores.finetunes.renew(lease) == "run"
        assert stores.finetunes.want("ann", lease.job_id, wanted).state == S.RUNNING
        assert stores.finetunes.renew(lease) == wanted
    stores.finetunes.move(moved, state, message="Stopped")
    stores.finetunes.release(released)
    stores.finetunes.reap(["c"])
    for lease in (moved, released, died):
        assert now(stores, lease.job).state == state
    assert stores.finetunes.claim("train", "w") is None


def test_a_job_resumed_before_it_had_stopped_is_queued_again(stores: Stores) -> None:
    """Nobody has to resume it twice."""
    lease = running(stores)
    stores.finetunes.want("ann", lease.job_id, "pause")
    stores.finetunes.want("ann", lease.job_id, "run")
    stores.finetunes.move(lease, S.PAUSED, message="Stopped")
    assert now(stores, lease.job).state == S.QUEUED
    assert claim(stores).job_id == lease.job_id


def test_what_is_wanted_already_changes_nothing(stores: Stores) -> None:
    """A request that was sent twice is no error and no event."""
    job = create(stores)
    stores.finetunes.want("ann", job.id, "run")
    for _ in range(2):
        assert stores.finetunes.want("ann", job.id, "pause").state == S.PAUSED
    for _ in range(2):
        assert stores.finetunes.want("ann", job.id, "cancel").state == S.CANCELLED
    assert len(events(stores, job)) == 3


def test_an_end_is_final(stores: Stores) -> None:
    """What has ended, or is being cancelled, is neither paused nor resumed."""
    done, failed, stopping = running(stores), running(stores), running(stores)
    stores.finetunes.move(done, S.SUCCEEDED, message="Done")
    stores.finetunes.move(failed, S.FAILED, message="Loss is NaN", level="error")
    stores.finetunes.want("ann", stopping.job_id, "cancel")
    for lease in (done, failed, stopping):
        for wanted in ("run", "pause"):
            with pytest.raises(IllegalTransition):
                stores.finetunes.want("ann", lease.job_id, wanted)
    with pytest.raises(IllegalTransition):
        stores.finetunes.want("ann", done.job_id, "cancel")
    assert not (stores.finetunes.path(done.job_id) / "cancel.json").exists()
    assert now(stores, done.job).state == S.SUCCEEDED


# --- claiming ---------------------------------------------------------------------------------


def test_owners_take_turns_however_many_jobs_one_has(stores: Stores) -> None:
    """An owner with twelve jobs gets every other one while another has some."""
    for _ in range(12):
        create(stores, owner="many")
    for _ in range(5):
        create(stores, owner="few")
    owners = [claim(stores, "validate").job.owner for _ in range(10)]
    assert owners.count("few") == 5
    assert all(pair[0] != pair[1] for pair in itertools.pairwise(owners))


def test_a_job_with_more_gpus_is_passed_over(stores: Stores) -> None:
    """Not by whoever has them; and without any, jobs for one run on the processor."""
    big = queued(stores, gpus=2)
    small = queued(stores, gpus=1)
    assert claim(stores, gpus=0).job_id == small.id
    assert stores.finetunes.claim("train", "w", 1) is None
    assert claim(stores, gpus=2).job_id == big.id


def test_a_job_is_validated_whatever_gpus_it_needs(stores: Stores) -> None:
    """That takes none."""
    job = create(stores, gpus=8)
    assert claim(stores, "validate", gpus=0).job_id == job.id


def test_a_job_has_one_holder(stores: Stores) -> None:
    """And is offered to nobody else meanwhile."""
    queued(stores)
    claim(stores)
    assert stores.finetunes.claim("train", "other", 1) is None
    assert stores.finetunes.demand(limit=9) == 0


def test_a_released_job_comes_back_after_its_delay(stores: Stores) -> None:
    """It says what it waits for, and the attempt counts if it shall."""
    lease = running(stores)
    stores.finetunes.release(lease, delay_s=0.3, waiting_for="2 GPUs", counts=True)
    job = now(stores, lease.job)
    assert (job.state, job.waiting_for, job.attempts) == (S.QUEUED, "2 GPUs", 1)
    assert stores.finetunes.claim("train", "w", 1) is None
    assert stores.finetunes.demand(limit=9) == 0
    time.sleep(0.35)
    assert stores.finetunes.demand(limit=9) == 1
    again = claim(stores)
    assert (again.attempts, again.job.waiting_for) == (1, None)


def test_resuming_does_not_wait_for_the_delay(stores: Stores) -> None:
    """Whoever resumes a job means now."""
    lease = running(stores)
    stores.finetunes.release(lease, delay_s=600)
    stores.finetunes.want("ann", lease.job_id, "pause")
    stores.finetunes.want("ann", lease.job_id, "run")
    assert claim(stores).job_id == lease.job_id


# --- what holders say -------------------------------------------------------------------------


def test_what_is_noted_is_seen_at_once_and_on_disk(stores: Stores) -> None:
    """Each note changes what it names and leaves the rest."""
    lease = running(stores)
    progress = Progress(step=3, total_steps=9, epoch=0.5, loss=1.25)
    stores.finetunes.note(lease, progress=progress, resolved={"batch_size": 4})
    checkpoint = FinetuneCheckpoint(3, "work/3/iter_3.pth", 1, {"train_loss": 1.25})
    stores.finetunes.note(lease, checkpoints=[checkpoint])
    job = now(stores, lease.job)
    assert (job.progress, job.resolved, job.checkpoints) == (
        progress,
        {"batch_size": 4},
        [checkpoint],
    )
    assert job.started_at is not None
    left = FinetuneFolder(stores.finetunes.path(job.id)).read_state(lease.token)
    assert left is not None
    assert left["progress"] == msgspec.to_builtins(progress)


@pytest.mark.parametrize(
    "fields", [{"state": "succeeded"}, {"wanted": "run"}, {"owner": "bob"}, {"nonsense": 1}]
)
def test_what_is_not_the_holders_cannot_be_noted(stores: Stores, fields: dict[str, Any]) -> None:
    """A mistake in a worker is an error there."""
    lease = running(stores)
    before = now(stores, lease.job)
    with pytest.raises(TypeError):
        stores.finetunes.note(lease, **fields)
    with pytest.raises(msgspec.ValidationError):
        stores.finetunes.note(lease, attempts="many")
    assert now(stores, lease.job) == before


def test_a_step_that_the_table_forbids_is_refused(stores: Stores) -> None:
    """And leaves no trace, on disk neither."""
    lease = claim(stores, "validate") if create(stores) else None
    assert lease is not None
    with pytest.raises(IllegalTransition):
        stores.finetunes.move(lease, S.SUCCEEDED, message="Done")
    assert now(stores, lease.job).state == S.VALIDATING_FILES
    left = FinetuneFolder(stores.finetunes.path(lease.job_id)).read_state(lease.token)
    assert left is not None
    assert left["state"] == S.VALIDATING_FILES


def test_the_event_comes_with_the_state(stores: Stores) -> None:
    """Once, however often the step is repeated after a lost answer."""
    lease = running(stores)
    for _ in range(2):
        stores.finetunes.move(lease, S.RUNNING, message="Training begins")
    for _ in range(2):
        stores.finetunes.move(
            lease, S.FAILED, message="Loss is NaN", level="error", data={"step": 4}
        )
    found = events(stores, lease.job)
    assert [event.message for event in found].count("Training begins") == 1
    assert (found[-1].message, found[-1].level, found[-1].data) == (
        "Loss is NaN",
        "error",
        {"step": 4},
    )
    assert [event.message for event in found].count("Loss is NaN") == 1


def test_a_step_of_training_is_told_once(stores: Stores) -> None:
    """By whoever tells it first: after a crash steps are done again."""
    lease = running(stores)
    for _ in range(2):
        stores.finetunes.add_events(lease, [metrics(step, loss=0.5) for step in (10, 20)])
    stores.finetunes.release(lease)
    again = claim(stores)
    stores.finetunes.add_events(again, [metrics(step, loss=0.7) for step in (20, 30)])
    told = [event for event in events(stores, lease.job) if event.type == "metrics"]
    assert [(event.data["step"], event.data["loss"]) for event in told] == [
        (10, 0.5),
        (20, 0.5),
        (30, 0.7),
    ]


# --- fencing ----------------------------------------------------------------------------------


@pytest.fixture
def overtaken(stores: Stores) -> tuple[FinetuneLease, FinetuneLease]:
    """A lease that expired while its job ran, and the one that another worker has on it."""
    old = running(stores, worker="slow")
    stores.finetunes.note(old, progress=Progress(step=5))
    let_expire(stores, old)
    assert stores.finetunes.reap() == [f"{old.job_id}|job"]
    return old, claim(stores, worker="quick")


def test_the_next_holder_has_a_higher_token_and_sees_the_attempt(
    stores: Stores, overtaken: tuple[FinetuneLease, FinetuneLease]
) -> None:
    """And what the last one noted."""
    old, new = overtaken
    assert new.job_id == old.job_id
    assert new.token > old.token
    assert (old.attempts, new.attempts) == (0, 1)
    assert new.job.state == S.QUEUED
    assert new.job.progress.step == 5
    assert "not heard of" in messages(stores, new.job)[-1]


def test_an_old_token_changes_nothing(
    stores: Stores, overtaken: tuple[FinetuneLease, FinetuneLease]
) -> None:
    """Whatever the late worker does: in Redis, and in what a rebuild would find."""
    old, new = overtaken
    before, told = now(stores, new.job), messages(stores, new.job)
    for late in (
        lambda: stores.finetunes.renew(old),
        lambda: stores.finetunes.note(old, stage="register"),
        lambda: stores.finetunes.add_events(old, [metrics(99), NewEvent("late")]),
        lambda: stores.finetunes.move(old, S.SUCCEEDED, message="Done"),
    ):
        with pytest.raises(LeaseLost):
            late()
    stores.finetunes.release(old, waiting_for="nothing", counts=True)
    assert now(stores, new.job) == before
    assert messages(stores, new.job) == told
    folder = FinetuneFolder(stores.finetunes.path(new.job_id))
    assert folder.latest_token() == new.token
    kept, damaged = folder.events()
    assert damaged == []
    assert sorted(event.message for event in kept) == sorted(told)
    assert stores.finetunes.renew(new) == "run"


def test_what_a_dead_worker_held_is_taken_back_at_once(stores: Stores) -> None:
    """And nothing of what others hold."""
    dead, alive = running(stores, worker="dead"), running(stores, worker="alive")
    assert stores.finetunes.reap(["dead", "unheard-of"]) == [f"{dead.job_id}|job"]
    assert now(stores, dead.job).state == S.QUEUED
    assert stores.finetunes.renew(alive) == "run"
    assert stores.finetunes.reap(["dead"]) == []


# --- files in use -----------------------------------------------------------------------------


def test_the_files_of_a_live_job_cannot_be_deleted(stores: Stores) -> None:
    """Rows, images, validation rows and configuration; when it has ended they can."""
    files = [upload(stores, b"x", purpose="fine-tune").id for _ in range(4)]
    data = DataSource(files[0], validation_file=files[1], images=files[2])
    job = create(stores, data=data, config_file=files[3])
    for file_id in files:
        with pytest.raises(FileInUse):
            stores.files.delete("ann", file_id)
    stores.finetunes.want("ann", job.id, "cancel")
    for file_id in files:
        stores.files.delete("ann", file_id)


# --- checkpoints ------------------------------------------------------------------------------


@pytest.fixture
def saved(stores: Stores) -> FinetuneLease:
    """A running job with a checkpoint."""
    lease = running(stores)
    stores.finetunes.note(lease, checkpoints=[FinetuneCheckpoint(64, "work/2/iter_64.pth", 1)])
    return lease


def test_a_checkpoint_is_converted_on_request(stores: Stores, saved: FinetuneLease) -> None:
    """While the job runs, once, whoever asks how often."""
    job = saved.job
    for _ in range(2):
        asked = stores.finetunes.request_checkpoint("ann", job.id, 64)
        assert asked.conversion == "requested"
    lease = claim(stores, "checkpoint", worker="c")
    assert (lease.job_id, lease.step) == (job.id, 64)
    assert stores.finetunes.claim("checkpoint", "c") is None
    assert stores.finetunes.renew(lease) == stores.finetunes.renew(saved) == "run"
    stores.finetunes.finish_checkpoint(lease, model="ft:tiny::x:ckpt-step-64")
    [checkpoint] = now(stores, job).checkpoints
    assert (checkpoint.conversion, checkpoint.model) == ("served", "ft:tiny::x:ckpt-step-64")
    assert stores.finetunes.request_checkpoint("ann", job.id, 64) == checkpoint
    assert stores.finetunes.claim("checkpoint", "c") is None
    with pytest.raises(NotFound):
        stores.finetunes.request_checkpoint("ann", job.id, 65)


def test_a_conversion_that_failed_may_be_asked_for_again(
    stores: Stores, saved: FinetuneLease
) -> None:
    """The reason is an event."""
    stores.finetunes.request_checkpoint("ann", saved.job_id, 64)
    stores.finetunes.finish_checkpoint(claim(stores, "checkpoint"), error="no room")
    [checkpoint] = now(stores, saved.job).checkpoints
    assert (checkpoint.conversion, checkpoint.model) == ("failed", None)
    assert "no room" in messages(stores, saved.job)[-1]
    again = stores.finetunes.request_checkpoint("ann", saved.job_id, 64)
    assert again.conversion == "requested"
    assert claim(stores, "checkpoint").attempts == 0


def test_a_conversion_whose_worker_died_is_done_by_another(
    stores: Stores, saved: FinetuneLease
) -> None:
    """And the first one is too late."""
    stores.finetunes.request_checkpoint("ann", saved.job_id, 64)
    old = claim(stores, "checkpoint", worker="dead")
    assert stores.finetunes.reap(["dead"]) == [f"{saved.job_id}|64"]
    new = claim(stores, "checkpoint", worker="alive")
    assert (new.attempts, now(stores, saved.job).attempts) == (1, 0)
    with pytest.raises(LeaseLost):
        stores.finetunes.finish_checkpoint(old, model="m")
    stores.finetunes.release(new, delay_s=0.1)
    assert stores.finetunes.claim("checkpoint", "w") is None
    time.sleep(0.15)
    stores.finetunes.finish_checkpoint(claim(stores, "checkpoint"), model="m")
    assert now(stores, saved.job).checkpoints[0].model == "m"
