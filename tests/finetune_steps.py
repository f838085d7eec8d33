"""Fine-tunes in stores without a node: recorded, claimed and moved step by step by the test."""

from __future__ import annotations

from typing import Any

from shared.clock import unix_now
from shared.finetune_store import FinetuneLease, FinetuneWork
from shared.finetunes import (
    DataSource,
    Finetune,
    FinetuneEvent,
    FinetuneSpec,
    FinetuneState,
    Recipe,
)
from shared.ids import new_id
from shared.stores import Stores

BASE = "tiny"


def spec(
    *, owner: str = "ann", gpus: int = 1, training_file: str = "file-train", **fields: Any
) -> FinetuneSpec:
    """What an owner may ask for."""
    return FinetuneSpec(
        id=new_id("ftjob-"),
        owner=owner,
        model=BASE,
        created_at=unix_now(),
        seed=7,
        data=fields.pop("data", DataSource(training_file)),
        recipe=Recipe(gpus=gpus),
        **fields,
    )


def create(stores: Stores, **fields: Any) -> Finetune:
    """A job that waits to be validated."""
    return stores.finetunes.create(spec(**fields))


def now(stores: Stores, job: Finetune) -> Finetune:
    """The job as it is now."""
    return stores.finetunes.get(job.owner, job.id)


def claim(
    stores: Stores, kind: FinetuneWork = "train", worker: str = "w", gpus: int = 1
) -> FinetuneLease:
    """Claim a job, which must be there."""
    lease = stores.finetunes.claim(kind, worker, gpus)
    assert lease is not None, f"nothing to {kind} waits"
    return lease


def queued(stores: Stores, **fields: Any) -> Finetune:
    """A job whose data was found good; it is the only one that waits to be validated."""
    job = create(stores, **fields)
    lease = claim(stores, "validate")
    assert lease.job_id == job.id
    stores.finetunes.move(lease, FinetuneState.QUEUED, message="Checked", stage="train")
    return now(stores, job)


def running(stores: Stores, worker: str = "w", **fields: Any) -> FinetuneLease:
    """A job that is being trained."""
    job = queued(stores, **fields)
    lease = claim(stores, worker=worker, gpus=job.recipe.gpus)
    assert lease.job_id == job.id
    stores.finetunes.move(lease, FinetuneState.RUNNING, message="Training begins")
    return lease


def events(stores: Stores, job: Finetune) -> list[FinetuneEvent]:
    """All events, oldest first."""
    return stores.finetunes.events(job.owner, job.id, limit=10_000).items[::-1]


def messages(stores: Stores, job: Finetune) -> list[str]:
    """What the events say, oldest first."""
    return [event.message for event in events(stores, job)]
