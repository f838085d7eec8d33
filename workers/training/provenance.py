"""What a tuned model came of: ``provenance.json`` in the job's folder, for people and for repeating it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from shared.clock import unix_now
from shared.finetunes import FinetuneSpec
from shared.models import ModelSource
from shared.storage import read_json, write_json
from workers.training.config import Resolved
from workers.training.data_report import DataReport
from workers.training.job_folder import JobFolder
from workers.training.plan import Base
from workers.training.saved import SavedCheckpoint


class BaseOrigin(msgspec.Struct, frozen=True):
    """The base model. ``source`` is the exact commit of a pulled one."""

    name: str
    path: str
    weights_bytes: int
    source: ModelSource | None


class AttemptRecord(msgspec.Struct, frozen=True):
    """One attempt at training. ``started_at`` is in Unix seconds; no GPUs: the processor."""

    token: int
    worker: str
    started_at: int
    gpus: list[str]
    resumed_from_step: int
    config_sha256: str
    versions: dict[str, str]


class Provenance(msgspec.Struct, frozen=True):
    """``data_sha256`` is of the rows as they were trained on, images by their content."""

    job: str
    model: str
    base: BaseOrigin
    data_sha256: str
    rows: int
    held_out: int
    seed: int
    recipe: dict[str, Any]
    attempts: list[AttemptRecord]
    final_checkpoint: str | None = None
    final_step: int | None = None


def record_attempt(
    folder: JobFolder,
    spec: FinetuneSpec,
    base: Base,
    report: DataReport,
    resolved: Resolved,
    attempt: AttemptRecord,
) -> None:
    """Write down what this attempt trains with. Raises: StorageFull, StorageFailed."""
    earlier = read(folder)
    write_json(
        folder.provenance,
        Provenance(
            job=spec.id,
            model=spec.tuned_name,
            base=BaseOrigin(
                base.record.name, str(base.path), base.facts.weights_bytes, base.record.source
            ),
            data_sha256=report.sha256,
            rows=report.train,
            held_out=report.held_out,
            seed=spec.seed,
            recipe=dict(msgspec.to_builtins(resolved)),
            attempts=[*(earlier.attempts if earlier else []), attempt],
        ),
    )


def record_end(folder: JobFolder, checkpoint: SavedCheckpoint) -> None:
    """Write down which checkpoint the model was made of. Raises: StorageFull, StorageFailed."""
    known = read(folder)
    if known is not None:
        path = str(checkpoint.path.relative_to(folder.path))
        write_json(
            folder.provenance,
            msgspec.structs.replace(known, final_checkpoint=path, final_step=checkpoint.step),
        )


def read(folder: JobFolder) -> Provenance | None:
    """What was written so far."""
    value = read_json(folder.provenance)
    return None if value is None else msgspec.convert(value, Provenance)


def new_attempt(
    token: int,
    worker: str,
    gpus: tuple[str, ...],
    resume: SavedCheckpoint | None,
    config: str,
    versions: dict[str, str],
) -> AttemptRecord:
    """An attempt that begins now."""
    return AttemptRecord(
        token=token,
        worker=worker,
        started_at=unix_now(),
        gpus=list(gpus),
        resumed_from_step=resume.step if resume else 0,
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        versions=versions,
    )
