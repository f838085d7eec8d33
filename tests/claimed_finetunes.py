"""Fine-tunes in stores without a node: taken through their states by the test, as a worker would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec

from shared.clock import unix_now
from shared.finetune_store import FinetuneLease, FinetuneWork
from shared.finetunes import FinetuneCheckpoint, FinetuneState
from shared.models import ModelRecord
from shared.storage import write_json
from shared.stores import Stores

WORKER = "test"


def claim(stores: Stores, kind: FinetuneWork, job_id: str) -> FinetuneLease:
    """The lease of this very job; those in line before it are cancelled."""
    while True:
        lease = stores.finetunes.claim(kind, WORKER, gpus=8)
        assert lease is not None, f"{job_id} is not in line for {kind}"
        if lease.job_id == job_id:
            return lease
        stores.finetunes.want(lease.job.owner, lease.job_id, "cancel")
        stores.finetunes.release(lease)


@contextlib.contextmanager
def training(stores: Stores, job_id: str) -> Iterator[FinetuneLease]:
    """A new job as it is while it trains; given back afterwards unless it was moved on."""
    validation = claim(stores, "validate", job_id)
    stores.finetunes.move(validation, FinetuneState.QUEUED, message="Its data is good")
    lease = claim(stores, "train", job_id)
    stores.finetunes.move(lease, FinetuneState.RUNNING, message="Training", stage="train")
    try:
        yield lease
    finally:
        stores.finetunes.release(lease)


def save(stores: Stores, lease: FinetuneLease, steps: Iterable[int]) -> None:
    """Note checkpoints of these steps."""
    found = [
        FinetuneCheckpoint(step, f"work/iter_{step}.pth", unix_now(), {"train_loss": 0.5})
        for step in steps
    ]
    stores.finetunes.note(lease, checkpoints=found)


def link_tuned(
    stores: Stores,
    name: str,
    folder: Path,
    *,
    job: str,
    visible_to: str | None = None,
    candidate: bool = False,
) -> str:
    """Register a tuned model as the end of a fine-tune does; answers with its name."""
    record = ModelRecord(
        name=name,
        path=str(folder),
        engine=None,
        trust_remote_code=False,
        created=unix_now(),
        owned_by="vlmq",
        visible_to=visible_to,
        base="base",
        job=job,
        candidate=candidate,
    )
    place = stores.layout.models / f"{quote(name, safe='')}.json"
    write_json(place, msgspec.to_builtins(record))
    return name
