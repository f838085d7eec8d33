"""``Idempotency-Key``: the same creating request sent twice creates once.

A key belongs to its owner and address. Used again with the same content it gets the first answer
back, marked ``idempotent-replayed: true``; with other content it is an error; while the first is
still worked on, a 409 to be tried again. A request that failed frees its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from flask import Response, request

from api.current import owner, stores
from api.errors import json_response
from shared.errors import InvalidValue
from shared.idempotency import IN_PROGRESS_S

HEADER = "Idempotency-Key"
_MAX_KEY_CHARACTERS = 255


def fingerprint(route: str, *content: bytes) -> str:
    """What makes two requests the same: address, owner and content, as a SHA-256 in hex."""
    digest = hashlib.sha256()
    for part in (route.encode(), owner().encode(), *content):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def once(
    route: str,
    content: Callable[[], str],
    create: Callable[[], bytes],
    *,
    limit_s: float = IN_PROGRESS_S,
) -> Response:
    """Answer with what ``create`` returns (JSON), or with what it returned for this key before.

    ``content`` gives the request's fingerprint; it is called only if there is a key. ``limit_s``
    is the longest that ``create`` can take.
    Raises: IdempotencyMismatch, IdempotencyInProgress, InvalidValue for a bad key.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return json_response(create())
    if not 0 < len(key) <= _MAX_KEY_CHARACTERS:
        raise InvalidValue(f"{HEADER} has 1 to {_MAX_KEY_CHARACTERS} characters", param=HEADER)
    mark, store = content(), stores().idempotency
    stored = store.claim(owner(), route, key, mark, limit_s=limit_s)
    if stored is not None:
        response = json_response(stored)
        response.headers["idempotent-replayed"] = "true"
        return response
    try:
        body = create()
    except BaseException:
        store.release(owner(), route, key)
        raise
    store.finish(owner(), route, key, mark, 200, body)
    return json_response(body)
