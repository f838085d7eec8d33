"""Connecting to Redis. Lost connections surface as QueueUnavailable, whichever call met them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.client import Pipeline
from redis.credentials import CredentialProvider

from shared.errors import ConfigurationError, QueueUnavailable
from shared.settings import Settings

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
    except redis.AuthenticationError as error:
        raise QueueUnavailable(
            "Redis refuses the password; check redis.password_file, or redis.url if it is in there"
        ) from error
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


class PasswordFile(CredentialProvider):
    """The password of a file, read whenever a connection is made.

    So it is in no setting, no URL and no snapshot, and a changed one counts from the next
    connection on.
    """

    def __init__(self, path: Path, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """What AUTH is sent with. Raises: ConfigurationError if the file holds no password."""
        try:
            password = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigurationError(
                f"redis.password_file: cannot read {self._path}: {reason}"
            ) from None
        if not password:
            raise ConfigurationError(f"redis.password_file: {self._path} is empty")
        return (password,) if self._username is None else (self._username, password)


def server_of(settings: Settings) -> tuple[str, PasswordFile | None]:
    """Where Redis answers, and the password for it if a file holds one.

    The URL is then free of names and passwords: the client library takes only one of both.
    Raises: ConfigurationError if the file cannot be read now.
    """
    path = settings.redis.password_file
    if path is None:
        return settings.redis_url, None
    parts = urlsplit(settings.redis_url)
    username = unquote(parts.username) if parts.username else None
    password = PasswordFile(path.expanduser().absolute(), username)
    # Said by whoever starts, instead of by every request later.
    password.get_credentials()
    # Not urlunsplit, which makes unix:/path of unix:///path.
    named, at, _ = parts.netloc.rpartition("@")
    return settings.redis_url.replace(named + at, "", 1), password


def connect(settings: Settings, *, max_connections: int = 1024) -> Connection:
    """A client for the configured Redis; connects on first use.

    Raises: ConfigurationError if the file of its password cannot be read.
    """
    url, password = server_of(settings)
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
    if password is not None:
        options["credential_provider"] = password
    pool = redis.ConnectionPool.from_url(url, **options)
    return Connection(connection_pool=pool)
