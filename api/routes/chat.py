"""``/v1/chat/completions``."""

from __future__ import annotations

from flask import Blueprint, Response, request

from api import current
from api.bodies import json_body, require_no_query
from api.connection import Client
from api.idempotency import fingerprint, once
from api.streaming import EventStream, Reading, collect
from shared.chat import ChatRequest, completion_body, encode, parse_chat_request
from shared.clock import unix_now

blueprint = Blueprint("chat", __name__)
_ROUTE = "chat.completions"


@blueprint.post("/v1/chat/completions")
def create_completion() -> Response:
    """Answer a conversation, at once or as a stream.

    The body goes to the worker as it came; the worker knows the model's defaults. An
    Idempotency-Key makes an answer that is not streamed replayable; a stream has none to keep.
    """
    require_no_query()
    body = json_body()
    asked = parse_chat_request(body)
    current.visible_model(asked.model)
    if asked.stream:
        return _streamed(asked, body)
    return once(
        _ROUTE,
        lambda: fingerprint(_ROUTE, body),
        lambda: _whole(asked, body),
        limit_s=current.stores().settings.api.request_timeout_s,
    )


def _submit(asked: ChatRequest, body: bytes) -> Reading:
    stores = current.stores()
    reply = stores.chats.submit(
        owner=current.owner(),
        model=asked.model,
        body=body,
        timeout_s=stores.settings.api.request_timeout_s,
        images=asked.image_count,
    )
    return Reading(reply, Client(request.environ))


def _whole(asked: ChatRequest, body: bytes) -> bytes:
    created = unix_now()
    reading = _submit(asked, body)
    text, end = collect(reading)
    completion = completion_body(
        completion_id=reading.id,
        created=created,
        model=asked.model,
        text=text,
        finish_reason=end.finish_reason,
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
    )
    return encode(completion)


def _streamed(asked: ChatRequest, body: bytes) -> Response:
    options = asked.stream_options
    stream = EventStream(
        _submit(asked, body),
        model=asked.model,
        include_usage=options is not None and options.include_usage,
    )
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return Response(stream, mimetype="text/event-stream", headers=headers)
