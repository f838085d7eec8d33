"""Connecting to Redis. Lost connections surface as QueueUnavailable, whichever call met them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.client import Pipeline

from shared.errors import QueueUnavailable

PREFIX = "vlmq:"
"""Every key of ours starts so; an ACL may be limited to it."""

# Without these a half-open TCP connection was never noticed.
SOCKET_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
HEALTH_CHECK_S = 5


_REFUSALS = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ExecAbortError,
)
# redis-py has no class for these. Not only at the start: a pipeline puts words of its own first.
_REFUSAL = re.compile(r"\b(MISCONF|OOM|READONLY|NOREPLICAS)\b")


@contextmanager
def redis_errors() -> Iterator[None]:
    """Turn "Redis is not there" into QueueUnavailable; leave programming errors alone."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnavailable(f"{QueueUnavailable.__doc__} ({type(error).__name__})") from error
    except redis.ResponseError as error:
        if isinstance(error, _REFUSALS) or _REFUSAL.search(str(error)):
            raise QueueUnavailable(f"Redis refuses to write: {error}") from error
        raise


class _Pipeline(Pipeline):
    def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002 - as redis-py's
        with redis_errors():
            return list(super().execute(raise_on_error))


class Connection(redis.Redis):
    """A Redis client whose failures to reach the server are ours.

    Stores hold it as ``Any``: redis-py annotates every answer as perhaps awaitable, perhaps text.
    """

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command. Raises: QueueUnavailable."""
        with redis_errors():
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:  # noqa: FBT001, FBT002 - as redis-py's
        """Commands sent together; ``execute`` raises QueueUnavailable."""
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def connect(url: str, *, max_connections: int = 1024) -> Connection:
    """A client for ``url`` (``redis://``, ``rediss://`` or ``unix://``); connects on first use."""
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_S,
        "decode_responses": False,
        "max_connections": max_connections,
    }
    if url.startswith("unix://"):
        del options["socket_connect_timeout"]
    else:
        options["socket_keepalive"] = True
    pool = redis.ConnectionPool.from_url(url, **options)
    return Connection(connection_pool=pool)
