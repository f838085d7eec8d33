"""Fine-tunes whose Redis was lost, put back from their folders; and what is deleted when."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from shared.clock import unix_now
from shared.errors import FileInUse, LeaseLost, NotFound
from shared.finetune_folder import FinetuneFolder
from shared.finetune_store import NewEvent
from shared.finetunes import (
    DataSource,
    Finetune,
    FinetuneCheckpoint,
    FinetuneError,
    FinetuneState,
    Progress,
)
from shared.models import ModelRecord
from shared.rebuild import missing_finetunes
from shared.retention import clear_leftovers, sweep
from shared.storage import write_json
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.finetune_steps import claim, create, events, messages, now, queued, running
from tests.stored_batches import claim as claim_chunk
from tests.stored_batches import commit, planned, run_control, upload
from tests.stored_batches import now as batch_now

S = FinetuneState
LEAP = 1 << 20
DAY_S = 86_400


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that keep batches and fine-tunes for three days."""
    storage = {"keep_batches_days": 3, "keep_finetunes_days": 3, "keep_files_days": 2}
    with connected(store_settings(redis_url, tmp_path, storage=storage)) as found:
        yield found


def lose_redis(stores: Stores) -> None:
    """Everything in it is gone, and put back."""
    stores.redis.flushall()
    report = stores.rebuild()
    assert report.damaged == []


def but_for_tokens(job: Finetune) -> Finetune:
    """The job without what a rebuild makes leap."""
    return msgspec.structs.replace(job, token=0)


def in_every_state(stores: Stores) -> list[Finetune]:
    """Jobs that nobody holds, in all states there are but running."""
    jobs = []
    for end in (S.SUCCEEDED, S.FAILED, S.CANCELLED, S.PAUSED):
        lease = running(stores)
        stores.finetunes.note(lease, progress=Progress(step=7, loss=0.5), trained_tokens=99)
        stores.finetunes.note(lease, checkpoints=[FinetuneCheckpoint(7, "work/7", 1)])
        stores.finetunes.add_events(
            lease, [NewEvent("Step 7", type="metrics", data={"step": 7, "loss": 0.5})]
        )
        if end == S.PAUSED:
            stores.finetunes.want("ann", lease.job_id, "pause")
        error = FinetuneError("nan", "the loss is NaN") if end == S.FAILED else None
        stores.finetunes.move(lease, end, message="Over", error=error)
        jobs.append(lease.job)
    interrupted = running(stores)
    stores.finetunes.release(interrupted, waiting_for="2 GPUs", counts=True)
    stores.finetunes.want("ann", interrupted.job_id, "pause")
    stores.finetunes.want("ann", interrupted.job_id, "run")
    jobs += [interrupted.job, queued(stores)]
    for wanted in ("pause", "cancel"):
        job = create(stores)
        stores.finetunes.want("ann", job.id, wanted)
        jobs.append(job)
    jobs.append(create(stores))
    return jobs


def test_every_job_that_nobody_held_comes_back_as_it_was(stores: Stores) -> None:
    """With all that was noted, every event under its number, and in the same place in line."""
    jobs = in_every_state(stores)
    before = [now(stores, job) for job in jobs]
    told = [events(stores, job) for job in jobs]
    assert {job.state for job in before} == set(FinetuneState) - {S.RUNNING}
    keys = sorted(key for key in stores.redis.keys("vlmq:*") if b"celery" not in key)
    for _ in range(2):
        lose_redis(stores)
        assert [but_for_tokens(now(stores, job)) for job in jobs] == [
            but_for_tokens(job) for job in before
        ]
        assert [events(stores, job) for job in jobs] == told
        assert stores.finetunes.demand(limit=99) == 3
    restored = sorted(key for key in stores.redis.keys("vlmq:*") if b"celery" not in key)
    assert restored == [key for key in keys if key != b"vlmq:metrics"]


def test_what_was_running_is_queued_again_with_what_was_noted(stores: Stores) -> None:
    """Its worker from before gets nowhere: new tokens are far above the old ones."""
    old = running(stores)
    stores.finetunes.note(old, progress=Progress(step=5))
    lose_redis(stores)
    job = now(stores, old.job)
    assert (job.state, job.progress.step) == (S.QUEUED, 5)
    new = claim(stores)
    assert new.token > old.token + LEAP // 2
    with pytest.raises(LeaseLost):
        stores.finetunes.renew(old)
    with pytest.raises(LeaseLost):
        stores.finetunes.note(old, progress=Progress(step=6))
    assert stores.finetunes.renew(new) == "run"
    stores.finetunes.move(new, S.RUNNING, message="Again")
    stores.finetunes.note(new, progress=Progress(step=8))
    lose_redis(stores)
    assert now(stores, job).progress.step == 8


@pytest.mark.parametrize(("wanted", "state"), [("pause", S.PAUSED), ("cancel", S.CANCELLED)])
def test_a_wish_is_not_forgotten(stores: Stores, wanted: Any, state: FinetuneState) -> None:
    """The holder had not heard of it when Redis was lost."""
    lease = running(stores)
    stores.finetunes.want("ann", lease.job_id, wanted)
    lose_redis(stores)
    assert now(stores, lease.job).state == state
    assert stores.finetunes.claim("train", "w", 1) is None


def test_what_is_there_is_left_alone(stores: Stores) -> None:
    """A rebuild beside work in progress takes nothing from it."""
    lease = running(stores)
    before, told = now(stores, lease.job), events(stores, lease.job)
    stores.rebuild()
    assert now(stores, lease.job) == before
    assert events(stores, lease.job) == told
    assert stores.finetunes.renew(lease) == "run"


def test_an_end_that_redis_never_heard_of_counts(stores: Stores) -> None:
    """It was on disk, with all that belongs to it, before the worker died."""
    lease = running(stores)
    folder = FinetuneFolder(stores.finetunes.path(lease.job_id))
    left = folder.read_state(lease.token)
    assert left is not None
    folder.write_state(lease.token, {**left, "state": "succeeded", "finished_at": 123})
    lose_redis(stores)
    job = now(stores, lease.job)
    assert (job.state, job.finished_at) == (S.SUCCEEDED, 123)


def test_the_next_holder_goes_on_from_what_was_only_on_disk(stores: Stores) -> None:
    """A worker noted checkpoints and events while Redis was away, and died."""
    old = running(stores, worker="dead")
    folder = FinetuneFolder(stores.finetunes.path(old.job_id))
    left = folder.read_state(old.token)
    assert left is not None
    checkpoint = FinetuneCheckpoint(9, "work/9", 1)
    folder.write_state(old.token, {**left, "checkpoints": [msgspec.to_builtins(checkpoint)]})
    first = folder.events()[0][0]
    unheard = [
        msgspec.structs.replace(first, key=str(number), message=f"Saved {number}")
        for number in range(2500)
    ]
    folder.append_events(old.token, unheard)
    stores.finetunes.reap(["dead"])
    new = claim(stores)
    assert (new.job.checkpoints, new.attempts) == ([checkpoint], 1)
    assert now(stores, new.job).checkpoints == [checkpoint]
    told = messages(stores, new.job)
    assert told[-2500:] == [event.message for event in unheard]
    assert told.count("Training begins") == 1


def test_requested_conversions_come_back(stores: Stores) -> None:
    """Those in work and those that wait are claimed anew, those done are not."""
    lease = running(stores)
    checkpoints = [FinetuneCheckpoint(step, f"work/{step}", 1) for step in (1, 2, 3)]
    stores.finetunes.note(lease, checkpoints=checkpoints)
    for step in (1, 2, 3):
        stores.finetunes.request_checkpoint("ann", lease.job_id, step)
    stores.finetunes.finish_checkpoint(claim(stores, "checkpoint"), model="m")
    claim(stores, "checkpoint")
    lose_redis(stores)
    found = [checkpoint.conversion for checkpoint in now(stores, lease.job).checkpoints]
    assert found == ["served", "requested", "requested"]
    assert {claim(stores, "checkpoint").step for _ in range(2)} == {2, 3}
    assert stores.finetunes.claim("checkpoint", "w") is None


def test_files_stay_protected_over_a_rebuild(stores: Stores) -> None:
    """Until the job has ended."""
    file_id = upload(stores, b"x", purpose="fine-tune").id
    job = create(stores, training_file=file_id)
    lose_redis(stores)
    with pytest.raises(FileInUse):
        stores.files.delete("ann", file_id)
    stores.finetunes.want("ann", job.id, "cancel")
    lose_redis(stores)
    stores.files.delete("ann", file_id)


def test_missing_jobs_are_counted(stores: Stores) -> None:
    """So that somebody hears of a lost Redis."""
    create(stores)
    assert missing_finetunes(stores.redis, stores.layout) == 0
    stores.redis.flushall()
    assert missing_finetunes(stores.redis, stores.layout) == 1


def test_what_is_damaged_is_named_and_holds_up_nothing_else(stores: Stores) -> None:
    """A lost event is one event less; a lost record is a job less."""
    lease, lost, whole = running(stores), create(stores), create(stores)
    stores.finetunes.add_events(lease, [NewEvent("one"), NewEvent("two")])
    log = stores.finetunes.path(lease.job_id) / "events" / f"{lease.token:010}.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"one"', b'"on'))
    (stores.finetunes.path(lost.id) / "job.json").write_text("{")
    stores.redis.flushall()
    report = stores.rebuild()
    assert report.finetunes == 2
    assert len(report.damaged) == 2
    assert lost.id in "".join(report.damaged)
    assert log.name in "".join(report.damaged)
    assert "two" in messages(stores, lease.job)
    assert now(stores, whole) == msgspec.structs.replace(whole, token=LEAP)


# --- retention --------------------------------------------------------------------------------


def ended(stores: Stores, days: float) -> Finetune:
    """A job that succeeded so long ago, with a result file."""
    lease = running(stores)
    result = upload(stores, b"r", purpose="fine-tune-results").id
    stores.finetunes.move(lease, S.SUCCEEDED, message="Done", result_files=[result])
    stores.redis.zadd("vlmq:finetunes_ended", {lease.job_id: unix_now() - days * DAY_S})
    return now(stores, lease.job)


def register(stores: Stores, job: Finetune) -> ModelRecord:
    """The model that came of a job."""
    record = ModelRecord(
        name=job.tuned_name,
        path=str(stores.finetunes.path(job.id) / "model"),
        engine=None,
        trust_remote_code=False,
        created=0,
        owned_by="vlmq",
    )
    write_json(stores.layout.models / f"{quote(record.name, safe='')}.json", record)
    return record


def test_an_old_job_goes_with_its_results(stores: Stores) -> None:
    """Not one that is younger or still lives."""
    old, young, live = ended(stores, 3.1), ended(stores, 2.9), create(stores)
    assert sweep(stores) == 1
    with pytest.raises(NotFound):
        now(stores, old)
    with pytest.raises(NotFound):
        stores.files.get("ann", old.result_files[0])
    assert not stores.finetunes.path(old.id).exists()
    assert stores.redis.keys(f"vlmq:*{old.id}*") == []
    assert [job.id for job in stores.finetunes.list("ann").items] == [live.id, young.id]


def test_the_folder_of_a_registered_model_is_never_deleted(stores: Stores) -> None:
    """Not before the model is removed."""
    job = ended(stores, 99)
    record = register(stores, job)
    assert sweep(stores) == 0
    assert now(stores, job) == job
    stores.models.remove(record.name)
    assert sweep(stores) == 1


def test_a_job_whose_checkpoint_is_about_to_be_served_stays(stores: Stores) -> None:
    """It would be deleted under the converter's hands."""
    lease = running(stores)
    stores.finetunes.note(lease, checkpoints=[FinetuneCheckpoint(1, "work/1", 1)])
    stores.finetunes.move(lease, S.SUCCEEDED, message="Done")
    stores.finetunes.request_checkpoint("ann", lease.job_id, 1)
    stores.redis.zadd("vlmq:finetunes_ended", {lease.job_id: 1})
    assert sweep(stores) == 0
    stores.finetunes.finish_checkpoint(claim(stores, "checkpoint"), error="no room")
    assert sweep(stores) == 1


def test_without_the_setting_jobs_are_kept(redis_url: str, tmp_path: Path) -> None:
    """Nothing is deleted that nobody asked to delete."""
    with connected(store_settings(redis_url, tmp_path)) as stores:
        job = ended(stores, 9999)
        assert sweep(stores) == 0
        assert now(stores, job) == job


def test_a_batch_that_a_live_job_learns_from_is_kept(stores: Stores) -> None:
    """With its input and output; when the job has ended all of it goes."""
    batch = planned(stores, 1)
    commit(stores, claim_chunk(stores))
    run_control(stores)
    batch = batch_now(stores, batch)
    assert batch.output_file_id is not None
    job = create(stores, data=DataSource(batch.id))
    stores.redis.zadd("vlmq:ended", {batch.id: 1})
    stores.redis.zadd("vlmq:uploads", {batch.input_file_id: 1})
    assert sweep(stores) == 0
    for file_id in (batch.input_file_id, batch.output_file_id):
        with pytest.raises(FileInUse):
            stores.files.delete("ann", file_id)
    stores.finetunes.want("ann", job.id, "cancel")
    assert sweep(stores) == 2


def test_what_a_killed_creation_left_is_cleared_after_a_day(stores: Stores) -> None:
    """A folder without job.json; never a job."""
    job = create(stores)
    half = stores.layout.finetunes / "ftjob-half"
    FinetuneFolder(half).create(job, FinetuneFolder(stores.finetunes.path(job.id)).events()[0][0])
    (half / "job.json").unlink()
    long_ago = unix_now() - 1.1 * DAY_S
    for path in stores.layout.finetunes.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    assert clear_leftovers(stores) == 1
    assert [path.name for path in stores.layout.finetunes.iterdir()] == [job.id]
