"""``/healthz`` and ``/readyz``: for probes, so without a key and without names of anything."""

from __future__ import annotations

import os
from collections.abc import Callable

from flask import Blueprint, Response

from api import current
from api.errors import RETRY_AFTER_S, json_response
from shared.errors import VlmqError
from shared.log import get_logger
from shared.storage import require_space, write_bytes

blueprint = Blueprint("health", __name__)
_log = get_logger(__name__)


@blueprint.get("/healthz")
def healthy() -> Response:
    """The process is up and answers."""
    return json_response({"status": "ok"})


@blueprint.get("/readyz")
def ready() -> Response:
    """Whether work can be accepted: 200, or 503 with the code of each check that failed."""
    checks = {"redis": _outcome("redis", _redis), "storage": _outcome("storage", _storage)}
    is_ready = all(outcome == "ok" for outcome in checks.values())
    body = {"status": "ready" if is_ready else "not_ready", "checks": checks}
    response = json_response(body, 200 if is_ready else 503)
    if not is_ready:
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    return response


def _outcome(name: str, check: Callable[[], None]) -> str:
    try:
        check()
    except VlmqError as error:
        _log.warning("not_ready", check=name, code=error.code, reason=error.message)
        return error.code
    return "ok"


def _redis() -> None:
    current.stores().presence.nodes()


def _storage() -> None:
    stores = current.stores()
    require_space(stores.layout.root, stores.settings.storage.min_free_bytes)
    probe = stores.layout.root / f".ready-{os.getpid()}"
    write_bytes(probe, b"")
    probe.unlink(missing_ok=True)
