"""``/v1/batches``."""

from __future__ import annotations

from itertools import chain

from flask import Blueprint, Response

from api import current
from api.bodies import json_body, parsed_query, require_no_body, require_no_query
from api.errors import json_response
from api.idempotency import fingerprint, once
from api.schemas.batches import BatchListQuery, BatchObject, CreateBatch, ResultsQuery, RowsQuery
from api.schemas.common import list_object
from shared.errors import InvalidValue, NotFound
from shared.files import FileRecord
from shared.idempotency import IN_PROGRESS_S
from shared.provenance import provenance
from shared.results import ResultPage
from shared.review import ReviewPage
from shared.row_reader import RowPage

blueprint = Blueprint("batches", __name__)
_ROUTE = "batches"
_RETRY_ROUTE = "batch_retries"
_SLOWEST_COPY_BYTES_PER_S = 10 << 20


@blueprint.post("/v1/batches")
def create() -> Response:
    """Queue the requests of an uploaded JSONL file."""
    require_no_query()
    body = json_body()
    asked = CreateBatch.model_validate_json(body)
    return once(_ROUTE, lambda: fingerprint(_ROUTE, body), lambda: _created(asked))


@blueprint.get("/v1/batches")
def list_batches() -> Response:
    """One page of the owner's batches, newest first."""
    query = parsed_query(BatchListQuery)
    page = current.stores().batches.list(current.owner(), after=query.after, limit=query.limit)
    items = [BatchObject.of(batch) for batch in page.items]
    return json_response(list_object(items, has_more=page.has_more))


@blueprint.get("/v1/batches/<batch_id>")
def retrieve(batch_id: str) -> Response:
    """One batch as it is now."""
    require_no_query()
    batch = current.stores().batches.get(current.owner(), batch_id)
    return json_response(BatchObject.of(batch).model_dump())


@blueprint.post("/v1/batches/<batch_id>/cancel")
def cancel(batch_id: str) -> Response:
    """Ask a batch to stop; what is done by then is kept."""
    require_no_query()
    require_no_body()
    batch = current.stores().batches.cancel(current.owner(), batch_id)
    return json_response(BatchObject.of(batch).model_dump())


@blueprint.get("/v1/batches/<batch_id>/results")
def results(batch_id: str) -> Response:
    """Lines that are done, in the order of the input, while the batch runs and afterwards.

    If reading fails half way the connection breaks off before the body's proper end.
    """
    query = parsed_query(ResultsQuery)
    page = current.stores().results.page(
        current.owner(), batch_id, after=query.after, limit=query.limit
    )
    return _streamed(page)


@blueprint.get("/v1/batches/<batch_id>/rows")
def rows(batch_id: str) -> Response:
    """The same lines flat, one object without nesting each, with what was asked."""
    query = parsed_query(RowsQuery)
    page = current.stores().rows.page(
        current.owner(),
        batch_id,
        after=query.after,
        limit=query.limit,
        with_messages=query.messages,
    )
    return _streamed(page)


@blueprint.get("/v1/batches/<batch_id>/review")
def review(batch_id: str) -> Response:
    """Of as many results as ``limit`` says, those that the quality gate wants reviewed."""
    query = parsed_query(ResultsQuery)
    page = current.stores().results.page(
        current.owner(), batch_id, after=query.after, limit=query.limit
    )
    return _streamed(ReviewPage(page))


@blueprint.get("/v1/batches/<batch_id>/provenance")
def provenance_of(batch_id: str) -> Response:
    """What the lines of a caption job came of."""
    require_no_query()
    found = provenance(current.stores().batches, current.owner(), batch_id)
    return json_response({"object": "list", "data": found})


@blueprint.post("/v1/batches/<batch_id>/retry")
def retry(batch_id: str) -> Response:
    """Make a new batch of the failed lines of one that has ended."""
    require_no_query()
    require_no_body()
    retries, owner = current.stores().retries, current.owner()
    return once(
        _RETRY_ROUTE,
        lambda: fingerprint(_RETRY_ROUTE, batch_id.encode()),
        lambda: BatchObject.of(retries.create(owner, batch_id)).model_dump_json().encode(),
        limit_s=IN_PROGRESS_S + retries.source_bytes(owner, batch_id) / _SLOWEST_COPY_BYTES_PER_S,
    )


def _streamed(page: ResultPage | RowPage | ReviewPage) -> Response:
    blocks = page.blocks()
    # What fails at once still gets its own status.
    first = next(blocks, b"")
    response = Response(chain([first], blocks) if first else b"", mimetype="application/x-ndjson")
    response.headers["vlmq-next-after"] = str(page.next_after)
    response.headers["vlmq-complete"] = "true" if page.complete else "false"
    response.headers["cache-control"] = "no-store"
    return response


def _created(asked: CreateBatch) -> bytes:
    expiry = asked.output_expires_after
    batch = current.stores().batches.create(
        owner=current.owner(),
        input_file=_input_file(asked.input_file_id),
        endpoint=asked.endpoint,
        completion_window=asked.completion_window,
        metadata=asked.metadata,
        output_expires_after_s=expiry.seconds if expiry else None,
    )
    return BatchObject.of(batch).model_dump_json().encode()


def _input_file(file_id: str) -> FileRecord:
    try:
        record = current.stores().files.get(current.owner(), file_id)
    except NotFound as error:
        raise InvalidValue(error.message, param="input_file_id") from None
    if record.purpose != "batch":
        raise InvalidValue(
            f"the file '{file_id}' was uploaded for '{record.purpose}'; a batch needs 'batch'",
            param="input_file_id",
        )
    return record
