"""Idempotency keys: a creating POST sent twice creates once and answers the same.

An answer is kept for a day. A key whose first request is still being worked on is refused with a
retryable error; if that server was killed, the key frees itself after the longest that the work
can take.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shared.connection import PREFIX, Connection
from shared.errors import IdempotencyInProgress, IdempotencyMismatch

KEEP_S = 24 * 3600
IN_PROGRESS_S = 60.0


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    fingerprint: str
    status: int = 0
    body: bytes = b""


class IdempotencyStore:
    """Claim a key, then finish or release it."""

    def __init__(self, client: Connection) -> None:
        self._redis: Any = client

    def claim(
        self,
        owner: str,
        route: str,
        key: str,
        fingerprint: str,
        *,
        limit_s: float = IN_PROGRESS_S,
    ) -> bytes | None:
        """``None`` if the caller should do the work, else the answer given the first time.

        ``limit_s`` is the longest that the work can take; then the key is free again.
        Raises: IdempotencyMismatch if the key came with another request, IdempotencyInProgress.
        """
        name = _name(owner, route, key)
        entry = msgspec.msgpack.encode(_Entry(fingerprint))
        if self._redis.set(name, entry, nx=True, px=int(limit_s * 1000)):
            return None
        raw = self._redis.get(name)
        if raw is None:
            return self.claim(owner, route, key, fingerprint, limit_s=limit_s)
        known = msgspec.msgpack.decode(raw, type=_Entry)
        if known.fingerprint != fingerprint:
            raise IdempotencyMismatch(param="Idempotency-Key")
        if known.status == 0:
            raise IdempotencyInProgress(param="Idempotency-Key")
        return known.body

    def finish(
        self, owner: str, route: str, key: str, fingerprint: str, status: int, body: bytes
    ) -> None:
        """Keep the answer."""
        entry = msgspec.msgpack.encode(_Entry(fingerprint, status, body))
        self._redis.set(_name(owner, route, key), entry, ex=KEEP_S)

    def release(self, owner: str, route: str, key: str) -> None:
        """The work failed; the key may be used again."""
        self._redis.delete(_name(owner, route, key))


def _name(owner: str, route: str, key: str) -> str:
    return f"{PREFIX}idempotency:{owner}:{route}:{key}"
