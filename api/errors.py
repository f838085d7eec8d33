"""Every failure as OpenAI's error object, and the id that ties an answer to the log.

One handler for each family: vlmq's own errors, Flask's HTTP errors, pydantic's, and anything
else, which is a defect: the client gets a 500 with the request's id, the log the traceback.

OpenAI's SDK sends 408, 409, 429 and >=500 again by itself. ``x-should-retry: false`` stops it
where the same request can never succeed, ``retry-after`` tells it when it may.
"""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec
import structlog
from flask import Flask, Response, g, request
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from api.bodies import discard_rest
from shared import statuses
from shared.errors import (
    BodyTooLarge,
    InvalidJson,
    InvalidRequest,
    InvalidValue,
    MethodNotAllowed,
    NotFound,
    StorageFull,
    UnsupportedParameter,
    VlmqError,
)
from shared.ids import new_id
from shared.log import get_logger

RETRY_AFTER_S = 1
_MAX_PARAM_CHARACTERS = 128
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_log = get_logger(__name__)


def register(app: Flask) -> None:
    """Install the handlers and the request ids."""
    app.before_request(_begin)
    app.after_request(_stamp)
    app.register_error_handler(VlmqError, _answer_known)
    app.register_error_handler(ValidationError, _answer_invalid)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_defect)


def request_id() -> str:
    """The id of the request being answered."""
    return cast(str, g.request_id)


def respond(error: VlmqError) -> Response:
    """The answer that tells the client about ``error``."""
    status = statuses.status_of(error)
    response = json_response(statuses.error_body(error), status)
    if not error.retryable or isinstance(error, StorageFull):
        response.headers["x-should-retry"] = "false"
    elif status in (409, 429, 503):
        response.headers["retry-after"] = str(error.retry_after_s)
    if status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` (anything msgspec encodes, or JSON bytes as they are) as an answer."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return Response(body, status, mimetype="application/json")


def from_validation(error: ValidationError) -> InvalidRequest:
    """Translate pydantic's first complaint into ours, with ``param`` set to the field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, reason = first["type"], first["msg"]
    if kind == "json_invalid":
        return InvalidJson(f"the body is not valid JSON: {reason}")
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    param = ".".join(parts)[:_MAX_PARAM_CHARACTERS] or None
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"the parameter '{param}' is not supported", param=param)
    if kind == "missing":
        return InvalidValue(f"the field '{param}' is required", param=param)
    return InvalidValue(f"{param or 'the body'}: {reason}", param=param)


def _begin() -> None:
    theirs = request.headers.get("x-request-id", "")
    g.request_id = theirs if _REQUEST_ID.fullmatch(theirs) else new_id("req_")
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def _stamp(response: Response) -> Response:
    response.headers["x-request-id"] = request_id()
    response.headers["x-content-type-options"] = "nosniff"
    if response.status_code >= 400:
        discard_rest()
    return response


def _answer_known(error: VlmqError) -> Response:
    if statuses.status_of(error) >= 500:
        _log.warning("request_failed", code=error.code, reason=error.message, path=request.path)
    return respond(error)


def _answer_invalid(error: ValidationError) -> Response:
    return respond(from_validation(error))


def _answer_http(error: HTTPException) -> Response:
    if error.code == 404:
        return respond(NotFound(f"there is nothing at {request.method} {_path()}"))
    if isinstance(error, RequestEntityTooLarge):
        return respond(BodyTooLarge())
    if error.code == 405:
        response = respond(MethodNotAllowed(f"{_path()} does not answer {request.method}"))
    else:
        status = error.code or 500
        body = statuses.body_of(
            status,
            message=error.description or error.name,
            param=None,
            code=error.name.lower().replace(" ", "_"),
        )
        response = json_response(body, status)
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def _path() -> str:
    return request.path[:_MAX_PARAM_CHARACTERS]


def _answer_defect(error: Exception) -> Response:
    _log.error("request_crashed", path=request.path, method=request.method, exc_info=error)
    message = f"something went wrong inside vlmq; its log has the details under {request_id()}"
    body = statuses.body_of(500, message=message, param=None, code=VlmqError.code)
    return json_response(body, 500)
