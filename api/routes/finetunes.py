"""``/v1/fine_tuning/jobs``."""

from __future__ import annotations

import secrets

from flask import Blueprint, Response

from api import current
from api.bodies import (
    json_body,
    parsed_query,
    require_no_body,
    require_no_query,
    single_query_values,
)
from api.errors import json_response
from api.finetune_sources import check_name, check_sources
from api.idempotency import fingerprint, once
from api.schemas.common import list_object
from api.schemas.finetune_request import MAX_SEED, CreateFinetune
from api.schemas.finetunes import (
    CheckpointListQuery,
    CheckpointObject,
    EventListQuery,
    EventObject,
    FinetuneObject,
    event_number,
    list_query,
)
from shared.clock import unix_now
from shared.errors import InvalidValue, NotFound
from shared.finetunes import Finetune, FinetuneSpec, Wanted
from shared.ids import new_id

blueprint = Blueprint("finetunes", __name__)
_ROUTE = "fine_tuning_jobs"


@blueprint.post("/v1/fine_tuning/jobs")
def create() -> Response:
    """Queue a fine-tune."""
    require_no_query()
    body = json_body()
    asked = CreateFinetune.model_validate_json(body)
    asked.check()
    return once(_ROUTE, lambda: fingerprint(_ROUTE, body), lambda: _created(asked))


@blueprint.get("/v1/fine_tuning/jobs")
def list_jobs() -> Response:
    """One page of the owner's fine-tunes, newest first."""
    query = list_query(single_query_values())
    page = current.stores().finetunes.list(
        current.owner(), after=query.after, limit=query.limit, metadata=query.metadata
    )
    items = [FinetuneObject.of(job) for job in page.items]
    return json_response(list_object(items, has_more=page.has_more))


@blueprint.get("/v1/fine_tuning/jobs/<job_id>")
def retrieve(job_id: str) -> Response:
    """One fine-tune as it is now."""
    require_no_query()
    return _answer(_job(job_id))


@blueprint.post("/v1/fine_tuning/jobs/<job_id>/cancel")
def cancel(job_id: str) -> Response:
    """Stop for good; checkpoints are kept."""
    return _wanted(job_id, "cancel")


@blueprint.post("/v1/fine_tuning/jobs/<job_id>/pause")
def pause(job_id: str) -> Response:
    """Stop for a while, with a checkpoint."""
    return _wanted(job_id, "pause")


@blueprint.post("/v1/fine_tuning/jobs/<job_id>/resume")
def resume(job_id: str) -> Response:
    """Go on from the last checkpoint."""
    return _wanted(job_id, "run")


@blueprint.get("/v1/fine_tuning/jobs/<job_id>/events")
def list_events(job_id: str) -> Response:
    """One page of what happened, newest first."""
    query = parsed_query(EventListQuery)
    page = current.stores().finetunes.events(
        current.owner(), job_id, after=event_number(job_id, query.after), limit=query.limit
    )
    items = [EventObject.of(job_id, event) for event in page.items]
    return json_response(list_object(items, has_more=page.has_more))


@blueprint.get("/v1/fine_tuning/jobs/<job_id>/checkpoints")
def list_checkpoints(job_id: str) -> Response:
    """One page of the checkpoints there are, newest first."""
    query = parsed_query(CheckpointListQuery)
    found = _checkpoints(_job(job_id))
    start = 0
    if query.after is not None:
        ids = [item.id for item in found]
        if query.after not in ids:
            raise InvalidValue(
                f"there is no checkpoint with the id '{query.after[:128]}'", param="after"
            )
        start = ids.index(query.after) + 1
    end = start + query.limit
    return json_response(list_object(found[start:end], has_more=end < len(found)))


@blueprint.post("/v1/fine_tuning/jobs/<job_id>/checkpoints/<checkpoint_id>/serve")
def serve_checkpoint(job_id: str, checkpoint_id: str) -> Response:
    """Have a checkpoint converted and registered as a model. Asking twice is asking once."""
    require_no_query()
    require_no_body()
    job = _job(job_id)
    step = _step(job, checkpoint_id)
    asked = current.stores().finetunes.request_checkpoint(current.owner(), job_id, step)
    return json_response(CheckpointObject.of(job, asked).model_dump())


def _created(asked: CreateFinetune) -> bytes:
    asked = check_sources(asked)
    spec = FinetuneSpec(
        id=new_id("ftjob-"),
        owner=current.owner(),
        model=asked.model,
        created_at=unix_now(),
        seed=secrets.randbelow(MAX_SEED + 1) if asked.seed is None else asked.seed,
        data=asked.data(),
        recipe=asked.recipe(),
        suffix=asked.suffix,
        config_file=asked.vlmq.config_file,
        metadata=asked.metadata,
    )
    check_name(spec)
    job = current.stores().finetunes.create(spec)
    return FinetuneObject.of(job).model_dump_json().encode()


def _wanted(job_id: str, wanted: Wanted) -> Response:
    require_no_query()
    require_no_body()
    return _answer(current.stores().finetunes.want(current.owner(), job_id, wanted))


def _job(job_id: str) -> Finetune:
    return current.stores().finetunes.get(current.owner(), job_id)


def _answer(job: Finetune) -> Response:
    return json_response(FinetuneObject.of(job).model_dump())


def _checkpoints(job: Finetune) -> list[CheckpointObject]:
    newest_first = sorted(job.checkpoints, key=lambda item: item.step, reverse=True)
    return [CheckpointObject.of(job, checkpoint) for checkpoint in newest_first]


def _step(job: Finetune, checkpoint_id: str) -> int:
    for checkpoint in _checkpoints(job):
        if checkpoint.id == checkpoint_id:
            return checkpoint.step_number
    raise NotFound(
        f"the job '{job.id}' has no checkpoint '{checkpoint_id[:128]}'; it may have made room for "
        "newer ones (vlmq.keep_checkpoints)",
        param="fine_tuning_checkpoint_id",
    )
