"""The store of files: uploads and results, ``files/<id>/{content,file.json}`` on shared storage.

``file.json`` is written last and makes the file whole; Redis indexes files by owner and age.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from shared.clock import unix_now
from shared.connection import PREFIX, Connection
from shared.errors import BodyTooLarge, FileInUse, NotFound
from shared.ids import is_id, new_id
from shared.paging import Page, ids_after
from shared.storage import (
    Layout,
    remove_tree,
    require_space,
    storage_errors,
    sync_folder,
    write_all,
    write_json,
)

OUTPUT_PURPOSE = "batch_output"

_UPLOADS = f"{PREFIX}uploads"
_EXPIRY = f"{PREFIX}file_expiry"
_CHECK_SPACE_EVERY_BYTES = 256 << 20


class FileRecord(msgspec.Struct, frozen=True):
    """A whole file. Times are Unix seconds; ``sha256`` is of its content."""

    id: str
    owner: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    sha256: str
    expires_at: int | None = None


class FileStore:
    """Write, read, list and delete files. Somebody else's file is as absent as a missing one."""

    def __init__(
        self, client: Connection, layout: Layout, *, max_bytes: int, min_free_bytes: int
    ) -> None:
        self._redis: Any = client
        self._layout = layout
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes

    def begin(
        self, *, owner: str, filename: str, purpose: str, expires_after_s: int | None = None
    ) -> FileWriter:
        """Start an upload. Raises: StorageFull."""
        require_space(self._layout.files, self._min_free_bytes)
        writer = FileWriter(self, owner, self._layout.file_dir(new_id("file-")), self._max_bytes)
        writer.filename = filename
        writer.purpose = purpose
        writer.expires_after_s = expires_after_s
        return writer

    def check_space(self) -> None:
        """Raise StorageFull when the disk is about to be full."""
        require_space(self._layout.files, self._min_free_bytes)

    def adopt(self, record: FileRecord) -> FileRecord:
        """Make a file whose content is in its folder whole, and list it."""
        write_json(self._layout.file_dir(record.id) / "file.json", record)
        self.index(record)
        return record

    def index(self, record: FileRecord) -> None:
        """List a whole file in Redis."""
        pipeline = self._redis.pipeline()
        pipeline.set(f"{PREFIX}file:{record.id}", msgspec.json.encode(record))
        pipeline.zadd(
            f"{PREFIX}files:{record.owner}", {record.id: record.created_at * 1000}, nx=True
        )
        if record.purpose != OUTPUT_PURPOSE:
            pipeline.zadd(_UPLOADS, {record.id: record.created_at})
        if record.expires_at is not None:
            pipeline.zadd(_EXPIRY, {record.id: record.expires_at})
        pipeline.execute()

    def get(self, owner: str, file_id: str) -> FileRecord:
        """The record of a file. Raises: NotFound."""
        if is_id(file_id, "file-"):
            raw = self._redis.get(f"{PREFIX}file:{file_id}")
            if raw is not None:
                record = msgspec.json.decode(raw, type=FileRecord)
                if record.owner == owner:
                    return record
        raise NotFound(f"there is no file '{file_id}'", param="file_id")

    def content_path(self, owner: str, file_id: str) -> Path:
        """Where the content is. Raises: NotFound."""
        return self._layout.file_dir(self.get(owner, file_id).id) / "content"

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
        purpose: str | None = None,
    ) -> Page[FileRecord]:
        """The owner's files by age. Raises: InvalidValue for an unknown ``after``."""
        index = f"{PREFIX}files:{owner}"
        found: list[FileRecord] = []
        has_more = True
        while has_more and len(found) <= limit:
            ids, has_more = ids_after(
                self._redis, index, after=after, limit=limit, newest_first=newest_first
            )
            if not ids:
                break
            after = ids[-1]
            rows = self._redis.mget([f"{PREFIX}file:{file_id}" for file_id in ids])
            records = [msgspec.json.decode(row, type=FileRecord) for row in rows if row is not None]
            found += [record for record in records if purpose in (None, record.purpose)]
        return Page(found[:limit], has_more=len(found) > limit or has_more)

    def delete(self, owner: str, file_id: str) -> None:
        """Delete a file. Raises: NotFound; FileInUse while a live batch reads it."""
        record = self.get(owner, file_id)
        if self._redis.scard(f"{PREFIX}users:{file_id}"):
            raise FileInUse(param="file_id")
        self.discard(record)

    def discard(self, record: FileRecord) -> None:
        """Delete a file and its listing: first the name, then the bytes."""
        pipeline = self._redis.pipeline()
        pipeline.delete(f"{PREFIX}file:{record.id}")
        pipeline.zrem(f"{PREFIX}files:{record.owner}", record.id)
        pipeline.zrem(_EXPIRY, record.id)
        pipeline.zrem(_UPLOADS, record.id)
        pipeline.execute()
        remove_tree(self._layout.file_dir(record.id))

    def overdue(self) -> Sequence[FileRecord]:
        """Files past their expiry that no live batch reads."""
        return self._unused(self._redis.zrangebyscore(_EXPIRY, "-inf", unix_now()))

    def uploaded_before(self, unix_s: int) -> Sequence[FileRecord]:
        """Uploads older than that, which no live batch reads."""
        return self._unused(self._redis.zrangebyscore(_UPLOADS, "-inf", f"({unix_s}"))

    def _unused(self, ids: Sequence[bytes]) -> Sequence[FileRecord]:
        rows = [self._redis.get(f"{PREFIX}file:{file_id.decode()}") for file_id in ids]
        records = [msgspec.json.decode(row, type=FileRecord) for row in rows if row is not None]
        return [record for record in records if not self._redis.scard(f"{PREFIX}users:{record.id}")]


class FileWriter:
    """An upload in progress; leaving the block without ``commit`` removes every trace of it."""

    def __init__(self, store: FileStore, owner: str, folder: Path, max_bytes: int) -> None:
        self.filename = ""
        self.purpose = ""
        self.expires_after_s: int | None = None
        self._store = store
        self._owner = owner
        self._folder = folder
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._next_check = _CHECK_SPACE_EVERY_BYTES
        self._committed = False
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        with storage_errors(self._folder):
            self._folder.mkdir(mode=0o700)
            try:
                # Unbuffered: closing it must not be what meets the full disk.
                self._stream = open(self._folder / "content", "xb", buffering=0)
                os.chmod(self._folder / "content", 0o600)
            except OSError:
                remove_tree(self._folder)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if not self._committed:
            remove_tree(self._folder)

    @property
    def sha256(self) -> str:
        """The digest of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises: BodyTooLarge, StorageFull."""
        assert self._stream is not None, "used outside its with block"
        self._bytes += len(data)
        if self._bytes > self._max_bytes:
            raise BodyTooLarge(f"the file is larger than {self._max_bytes} bytes", param="file")
        if self._bytes >= self._next_check:
            self._store.check_space()
            self._next_check = self._bytes + _CHECK_SPACE_EVERY_BYTES
        self._digest.update(data)
        with storage_errors(self._folder):
            write_all(self._stream, data)

    def commit(self) -> FileRecord:
        """Make the file durable and list it. Raises: StorageFull, QueueUnavailable."""
        assert self._stream is not None, "used outside its with block"
        with storage_errors(self._folder):
            os.fsync(self._stream.fileno())
            sync_folder(self._folder.parent)
        now = unix_now()
        record = FileRecord(
            id=self._folder.name,
            owner=self._owner,
            bytes=self._bytes,
            created_at=now,
            filename=self.filename,
            purpose=self.purpose,
            sha256=self.sha256,
            expires_at=now + self.expires_after_s if self.expires_after_s else None,
        )
        self._store.adopt(record)
        self._committed = True
        return record
