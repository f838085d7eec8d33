"""Fine-tunes on the wire: jobs, their events and checkpoints, and the queries of their lists."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field

from api.schemas.batches import Metadata
from api.schemas.common import Fields
from shared.clock import unix_now
from shared.errors import InvalidValue, UnsupportedParameter
from shared.finetunes import (
    Finetune,
    FinetuneCheckpoint,
    FinetuneEvent,
    FinetuneState,
    Recipe,
)
from shared.ids import is_id

Auto = Literal["auto"]
_JOB = "ftjob-"
_MAX_DIGITS = 10
_METADATA_FIELD = re.compile(r"metadata\[([^\[\]]*)\]")


# --- queries --------------------------------------------------------------------------------------


class FinetuneListQuery(Fields):
    """The query of ``GET /v1/fine_tuning/jobs``."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    metadata: Metadata | None = None


class EventListQuery(Fields):
    """The query of ``GET /v1/fine_tuning/jobs/{id}/events``; ``after`` is an event's id."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20


class CheckpointListQuery(Fields):
    """The query of ``GET /v1/fine_tuning/jobs/{id}/checkpoints``; ``after`` is a checkpoint's id."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 10


def list_query(fields: dict[str, str]) -> FinetuneListQuery:
    """Understand ``after``, ``limit`` and any number of ``metadata[KEY]=VALUE``.

    Raises: UnsupportedParameter for ``metadata=null``; InvalidValue or pydantic's ValidationError.
    """
    if "metadata" in fields:
        raise UnsupportedParameter(
            "filter by metadata with metadata[KEY]=VALUE; 'metadata' alone is not supported",
            param="metadata",
        )
    plain: dict[str, Any] = {}
    wanted: dict[str, str] = {}
    for name, value in fields.items():
        found = _METADATA_FIELD.fullmatch(name)
        if found is None:
            plain[name] = value
        else:
            wanted[found[1]] = value
    return FinetuneListQuery.model_validate({**plain, "metadata": wanted or None})


# --- the job --------------------------------------------------------------------------------------


class ShownHyperparameters(BaseModel):
    """What was asked for, ``auto`` until the server has chosen, then what it chose."""

    batch_size: int | Auto
    learning_rate_multiplier: float | Auto
    n_epochs: int | Auto


class ShownSupervised(BaseModel):
    """The settings of the one method there is."""

    hyperparameters: ShownHyperparameters


class ShownMethod(BaseModel):
    """How the job tunes."""

    type: Literal["supervised"] = "supervised"
    supervised: ShownSupervised


class ShownError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class FinetuneExtras(BaseModel):
    """What OpenAI's object has no room for.

    ``wanted`` is what its owner asked for last, ``stage`` the step it is at, ``waiting_for`` why it
    does not go on. ``recipe`` and ``data`` are as they were asked for, null where the server
    chooses; ``resolved`` is what it chose. Times are Unix seconds.
    """

    stage: str
    wanted: str
    waiting_for: str | None
    suffix: str | None
    started_at: int | None
    attempts: int
    progress: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    config_file: str | None
    resolved: dict[str, Any] | None
    data_report: dict[str, Any] | None


class FinetuneObject(BaseModel):
    """A fine-tuning job. Every key is always there; times are Unix seconds."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    hyperparameters: ShownHyperparameters
    method: ShownMethod
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: ShownError | None
    seed: int
    estimated_finish: int | None
    metadata: dict[str, str] | None
    vlmq: FinetuneExtras

    @classmethod
    def of(cls, job: Finetune) -> FinetuneObject:
        """The wire's view of a fine-tune."""
        chosen = _hyperparameters(job)
        return cls(
            id=job.id,
            created_at=job.created_at,
            finished_at=job.finished_at,
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            organization_id=job.owner,
            status=job.state.value,
            hyperparameters=chosen,
            method=ShownMethod(supervised=ShownSupervised(hyperparameters=chosen)),
            training_file=job.data.training_file,
            validation_file=job.data.validation_file,
            result_files=job.result_files,
            trained_tokens=job.trained_tokens,
            error=_error(job),
            seed=job.seed,
            estimated_finish=_estimated_finish(job),
            metadata=job.metadata,
            vlmq=_extras(job),
        )


def _hyperparameters(job: Finetune) -> ShownHyperparameters:
    return ShownHyperparameters(
        batch_size=_shown(job, "batch_size"),
        learning_rate_multiplier=_shown(job, "learning_rate_multiplier"),
        n_epochs=_shown(job, "n_epochs"),
    )


def _shown(job: Finetune, name: str) -> Any:
    for value in (job.resolved.get(name), getattr(job.recipe, name)):
        if value is not None:
            return value
    # What is resolved is the learning rate itself; not to have asked for a multiple means once.
    return 1.0 if job.resolved and name == "learning_rate_multiplier" else "auto"


def _error(job: Finetune) -> ShownError | None:
    if job.error is None:
        return None
    return ShownError(code=job.error.code, message=job.error.message, param=job.error.param)


def _estimated_finish(job: Finetune) -> int | None:
    """When training will be through; what follows it takes little beside it."""
    is_training = job.state is FinetuneState.RUNNING and job.stage == "train"
    if not is_training or job.progress.eta_s is None:
        return None
    return unix_now() + round(job.progress.eta_s)


def _extras(job: Finetune) -> FinetuneExtras:
    return FinetuneExtras(
        stage=job.stage,
        wanted=job.wanted,
        waiting_for=job.waiting_for,
        suffix=job.suffix,
        started_at=job.started_at,
        attempts=job.attempts,
        progress=msgspec.to_builtins(job.progress),
        recipe=_fields(job.recipe),
        data=_fields(job.data),
        config_file=job.config_file,
        resolved=job.resolved or None,
        data_report=job.data_report or None,
    )


def _fields(value: Recipe | msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(value)
    return found


# --- events ---------------------------------------------------------------------------------------


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, job_id: str, event: FinetuneEvent) -> EventObject:
        """The wire's view of an event."""
        return cls(
            id=event_id(job_id, event.number),
            created_at=event.created_at,
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data or None,
        )


def event_id(job_id: str, number: int) -> str:
    """An event's id: its job's digits, ``x``, its number."""
    return f"ftevent-{job_id.removeprefix(_JOB)}x{number}"


def event_number(job_id: str, text: str | None) -> int | None:
    """The number inside an event's id. Raises: InvalidValue for another job's, or no id."""
    if text is None:
        return None
    start = event_id(job_id, 0)[:-1]
    digits = text.removeprefix(start)
    if not is_id(text, start) or not digits.isdecimal() or len(digits) > _MAX_DIGITS:
        raise InvalidValue(f"'{text[:128]}' is not the id of an event of this job", param="after")
    return int(digits)


# --- checkpoints ----------------------------------------------------------------------------------


class CheckpointExtras(BaseModel):
    """The model it is served as, or null; how far that is: null, requested, served or failed."""

    model: str | None
    conversion: str | None


class CheckpointObject(BaseModel):
    """A checkpoint that was saved whole. ``metrics`` has the keys the trainer wrote."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float | None]
    step_number: int
    vlmq: CheckpointExtras

    @classmethod
    def of(cls, job: Finetune, checkpoint: FinetuneCheckpoint) -> CheckpointObject:
        """The wire's view of a checkpoint."""
        return cls(
            id=checkpoint_id(job.id, checkpoint.step),
            created_at=checkpoint.created_at,
            fine_tuned_model_checkpoint=checkpoint.model or checkpoint_name(job, checkpoint.step),
            fine_tuning_job_id=job.id,
            metrics={"step": checkpoint.step, **checkpoint.metrics},
            step_number=checkpoint.step,
            vlmq=CheckpointExtras(model=checkpoint.model, conversion=checkpoint.conversion),
        )


def checkpoint_name(job: Finetune, step: int) -> str:
    """What a checkpoint's model is called once it is served."""
    return f"{job.tuned_name}:ckpt-step-{step}"


def checkpoint_id(job_id: str, step: int) -> str:
    """A checkpoint's id: its job's digits, ``x``, its step."""
    return f"ftckpt_{job_id.removeprefix(_JOB)}x{step}"
