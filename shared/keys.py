"""API keys: who they belong to, hashed at rest.

A key is 256 random bits, so a plain SHA-256 of it cannot be guessed back. Every program re-reads
the file when it changes; no restart is needed after ``vlmq keys``.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shared.clock import unix_now
from shared.errors import InvalidValue, NotAuthenticated, NotFound, StorageFailed
from shared.ids import new_id
from shared.storage import read_json, storage_errors, write_json

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeyRecord(msgspec.Struct, frozen=True):
    """A key without its secret. ``digest`` is the secret's SHA-256 in hex."""

    id: str
    owner: str
    name: str
    created_at: int
    digest: str


class KeyStore:
    """Create, list, revoke and check keys."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._by_digest: dict[str, KeyRecord] = {}

    def create(self, owner: str, *, name: str = "") -> tuple[KeyRecord, str]:
        """Make a key; its secret is returned this once and kept nowhere. Raises: InvalidValue."""
        if not _OWNER.fullmatch(owner):
            raise InvalidValue(
                "an owner's name holds at most 64 letters, digits and . _ -", param="owner"
            )
        secret = f"vlmq-{secrets.token_urlsafe(32)}"
        record = KeyRecord(
            id=new_id("key_"),
            owner=owner,
            name=name,
            created_at=unix_now(),
            digest=_digest(secret),
        )
        with self._locked():
            write_json(self._path, [*self.list(), record])
        return record, secret

    def list(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        value = read_json(self._path)
        try:
            return [] if value is None else msgspec.convert(value, list[KeyRecord])
        except msgspec.ValidationError as error:
            raise StorageFailed(f"{self._path} is damaged: {error}") from error

    def revoke(self, key_id: str) -> None:
        """Delete a key; it stops working at once. Raises: NotFound."""
        with self._locked():
            keys = self.list()
            left = [key for key in keys if key.id != key_id]
            if len(left) == len(keys):
                raise NotFound(f"there is no key '{key_id}'")
            write_json(self._path, left)

    def required(self) -> bool:
        """Whether requests need a key: from the first ``create`` on, even if all are revoked."""
        return self._path.exists()

    def authenticate(self, secret: str) -> KeyRecord:
        """Whose key this is. Raises: NotAuthenticated."""
        self._refresh()
        digest = _digest(secret)
        record = self._by_digest.get(digest)
        if record is None or not hmac.compare_digest(record.digest, digest):
            raise NotAuthenticated()
        return record

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._by_digest = None, {}
            return
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._by_digest = {key.digest: key for key in self.list()}
            self._stamp = stamp

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with storage_errors(self._path):
            descriptor = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
