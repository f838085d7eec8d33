"""``/v1/captions``: image sets as batches."""

from __future__ import annotations

from flask import Blueprint, Response

from api import current
from api.bodies import json_body, require_no_query
from api.caption_sources import check_source
from api.idempotency import fingerprint, once
from api.schemas.batches import BatchObject
from api.schemas.captions import CreateCaptions, parse_captions

blueprint = Blueprint("captions", __name__)
_ROUTE = "captions"
_ENDPOINT = "/v1/chat/completions"


@blueprint.post("/v1/captions")
def create() -> Response:
    """Caption an image set; the answer is a batch."""
    require_no_query()
    body = json_body()
    asked = parse_captions(body)
    return once(_ROUTE, lambda: fingerprint(_ROUTE, body), lambda: _created(asked))


def _created(asked: CreateCaptions) -> bytes:
    source, expiry = asked.source(), asked.output_expires_after
    check_source(source)
    batch = current.stores().batches.create(
        owner=current.owner(),
        source=source,
        endpoint=_ENDPOINT,
        completion_window=asked.completion_window,
        metadata=asked.metadata,
        output_expires_after_s=expiry.seconds if expiry else None,
    )
    return BatchObject.of(batch).model_dump_json().encode()
