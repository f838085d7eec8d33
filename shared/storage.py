"""Files that are whole or absent: write to a temporary name, fsync, rename, fsync the folder.

The shared storage is the truth that survives; everything under ``data_dir`` is written through
this module. A full disk raises :class:`~shared.errors.StorageFull` and leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from shared.errors import StorageFailed, StorageFull

_FULL = {errno.ENOSPC, errno.EDQUOT}
TEMPORARY_SUFFIX = ".part"


class Layout:
    """Where each kind of record lives below ``data_dir``. Knows names, not contents."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir
        self.files = data_dir / "files"
        self.batches = data_dir / "batches"
        self.models = data_dir / "models"
        self.checkpoints = data_dir / "checkpoints"
        self.finetunes = data_dir / "finetunes"
        self.captions = data_dir / "captions"
        self.keys = data_dir / "keys.json"

    def file_dir(self, file_id: str) -> Path:
        """The folder of one uploaded or produced file."""
        return self.files / file_id

    def batch_dir(self, batch_id: str) -> Path:
        """The folder of one batch."""
        return self.batches / batch_id

    def finetune_dir(self, job_id: str) -> Path:
        """The folder of one fine-tune."""
        return self.finetunes / job_id

    def caption_set_dir(self, set_id: str) -> Path:
        """The folder of what is known of one image set that is synced."""
        return self.captions / set_id

    def create(self) -> None:
        """Make the folders, readable by this user only (they hold people's images)."""
        with storage_errors(self.root):
            kinds = (self.files, self.batches, self.models, self.finetunes, self.captions)
            for folder in (self.root, *kinds):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` below into StorageFull or StorageFailed that name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"no space left for {path.name}; {StorageFull.__doc__}") from error
        raise StorageFailed(f"{path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path``, durable, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with storage_errors(path):
        try:
            with open(temporary, "xb") as stream:
                os.chmod(temporary, 0o600)
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write all of ``data`` to an unbuffered stream; a nearly full disk takes a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole and durable."""
    with atomic_file(path) as stream:
        stream.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole and durable."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def read_json(path: Path) -> Any | None:
    """The JSON value in ``path``, or ``None`` if there is no such file.

    Raises: StorageFailed if it cannot be read or is not JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise StorageFailed(f"{path} is damaged: {error}") from error


def remove_tree(folder: Path) -> None:
    """Delete ``folder``; renamed away first, so that a kill never leaves half of it visible."""
    doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with storage_errors(folder):
        try:
            os.rename(folder, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise StorageFull unless the disk of ``folder`` has ``needed_bytes`` free."""
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageFull(
            f"the disk that holds vlmq's data has {free >> 20} MiB free and "
            f"{needed_bytes >> 20} MiB are needed; free some space and try again"
        )
