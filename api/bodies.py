"""Reading what a request says, with bounds: its body, its JSON, its query.

Werkzeug's own parsing of bodies and forms is never used: it would hold an upload in memory or in
a second temporary file, and would let a short body pass for a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from flask import request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel
from werkzeug.exceptions import RequestTimeout, UnsupportedMediaType

from api.current import stores
from api.schemas.common import NoFields
from shared.errors import BodyTooLarge, InvalidRequest, InvalidValue

CHUNK_BYTES = 256 * 1024
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_S = 5.0
M = TypeVar("M", bound=BaseModel)


def body_chunks(max_bytes: int, *, what: str = "the body") -> Iterator[bytes]:
    """The body piece by piece, ``CHUNK_BYTES`` at most each, read as it arrives.

    Raises: BodyTooLarge, before reading if the client says the length; InvalidRequest if the body
    ends before its announced length; RequestTimeout if the client stops sending.
    """
    announced = request.content_length
    if announced is not None and announced > max_bytes:
        raise _too_large(what, max_bytes)
    received = 0
    while chunk := _read(CHUNK_BYTES):
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(what, max_bytes)
        yield chunk
    if announced is not None and received < announced:
        raise InvalidRequest(f"the body ended after {received} of {announced} bytes")


def discard_rest() -> None:
    """Read what is left of a body that is refused, up to a limit of bytes and seconds.

    What is left over would make gunicorn close a connection that its client takes for a good one,
    and the client's next request would get no answer.
    """
    if (request.content_length or 0) > DISCARD_BYTES:
        return
    give_up_at = time.monotonic() + DISCARD_S
    left = DISCARD_BYTES
    try:
        while left > 0 and time.monotonic() < give_up_at:
            piece = request.environ["wsgi.input"].read(min(CHUNK_BYTES, left))
            if not piece:
                return
            left -= len(piece)
    except (ParseException, OSError):
        return  # nothing can follow on this connection, which gunicorn closes


def json_body() -> bytes:
    """The whole JSON body, not yet parsed.

    Raises: BodyTooLarge, InvalidRequest; UnsupportedMediaType unless it is said to be JSON.
    """
    if not request.is_json:
        raise UnsupportedMediaType("send the body as JSON, with content-type: application/json")
    return b"".join(body_chunks(stores().settings.api.max_body_bytes))


def parsed_query(schema: type[M]) -> M:
    """The query parameters. Raises: InvalidValue, UnsupportedParameter (as ValidationError)."""
    return schema.model_validate(single_query_values())


def single_query_values() -> dict[str, str]:
    """The query parameters as text. Raises: InvalidValue for one that is given twice."""
    for name, values in request.args.lists():
        if len(values) > 1:
            raise InvalidValue(f"{name}: give this parameter once", param=name)
    return request.args.to_dict()


def require_no_query() -> None:
    """Refuse any query parameter by its name."""
    parsed_query(NoFields)


def require_no_body() -> None:
    """Refuse a body, other than an empty JSON object."""
    body = b"".join(body_chunks(stores().settings.api.max_body_bytes))
    if body.strip():
        NoFields.model_validate_json(body)


def _read(size: int) -> bytes:
    try:
        data: bytes = request.environ["wsgi.input"].read(size)
    except BlockingIOError:
        # How a receive time-out set on the socket shows (api.connection sets one).
        raise RequestTimeout("the body did not arrive in time") from None
    except (ParseException, OSError) as error:
        raise InvalidRequest(f"the body could not be read: {error}") from None
    return data


def _too_large(what: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"{what} is larger than the {max_bytes} bytes this server accepts")
