"""How an error looks on the wire: its HTTP status, OpenAI's error type, the body that carries both.

Used by the API for its answers and by batches for the lines of their error files, so that the same
failure reads the same in both.
"""

from __future__ import annotations

from typing import Any

from shared import errors
from shared.errors import VlmqError

_STATUS: dict[type[VlmqError], int] = {
    errors.VlmqError: 500,
    errors.InvalidRequest: 400,
    errors.FileInUse: 409,
    errors.IdempotencyMismatch: 422,
    errors.IdempotencyInProgress: 409,
    errors.BodyTooLarge: 413,
    errors.NotAuthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.RateLimited: 429,
    errors.EngineError: 500,
    errors.EngineCrashed: 503,
    errors.EngineBusy: 503,
    errors.EngineUnavailable: 503,
    errors.ImagesCutOtherwise: 503,
    errors.RequestAborted: 499,
    errors.ModelUnavailable: 503,
    errors.GpuLent: 503,
    errors.RequestTimedOut: 504,
    errors.BatchCancelled: 409,
    errors.BatchExpired: 409,
    errors.HubRefused: 403,
    errors.HubUnavailable: 503,
    errors.StorageFull: 507,
    errors.StorageFailed: 503,
    errors.QueueUnavailable: 503,
    # Not 409, which OpenAI's SDK would send again.
    errors.IllegalTransition: 400,
}

_TYPE = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def status_of(error: VlmqError) -> int:
    """The HTTP status of an error: its own class's, or that of the nearest one above it."""
    return next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)


def type_of(status: int) -> str:
    """OpenAI's error type for an HTTP status of 400 or more."""
    return _TYPE.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def body_of(status: int, *, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``, always with all four keys."""
    return {
        "error": {"message": message, "type": type_of(status), "param": param, "code": code},
    }


def error_body(error: VlmqError) -> dict[str, Any]:
    """The body that tells a client about ``error``."""
    return body_of(status_of(error), message=error.message, param=error.param, code=error.code)
