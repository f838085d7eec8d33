"""Sidecars: each caption in a ``.txt`` of its own, beside the image or in a tree like the images'.

Files appear whole. One that an export did not write, or that was changed since, is a person's own
and is kept unless told otherwise. No link is followed below the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from cli.export.names import MAX_NAME_BYTES, Names, caption_name
from cli.export.staging import move_into, write_errors, write_failure
from cli.export.writing import LeftOut, Report
from cli.export.written import FOLDER, Written
from shared.result_rows import ResultRow

_GROUP = 512
_MAX_OWN_BYTES = 16 << 20
"""Larger than any caption: a file of this size is not ours."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Sidecar(NamedTuple):
    row: ResultRow
    folders: tuple[bytes, ...]
    name: bytes
    text: bytes
    digest: bytes

    @property
    def path(self) -> bytes:
        return b"/".join((*self.folders, self.name))

    @property
    def entry(self) -> tuple[bytes, bytes]:
        return self.path, self.digest


class SidecarWriter:
    """Writes below the folder ``root``, some hundred files at a time."""

    def __init__(self, root: Path, names: Names, report: Report, *, overwrite: bool) -> None:
        with write_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        self._root = root.resolve()
        self._names = names
        self._report = report
        self._overwrite = overwrite
        self._waiting: list[_Sidecar] = []
        self._written = Written(self._root)
        self._folders = _Folders(self._root)
        self._ours: list[tuple[bytes, bytes]] = []
        self._not_ours: list[tuple[bytes, bytes]] = []
        self.fates: Counter[str] = Counter()
        """How many were ``new``, ``replaced`` or there already (``same``)."""

    def add(self, row: ResultRow) -> None:
        """Take one row. Raises: LeftOut if its name cannot be that of a file here."""
        *folders, image = self._names.below(row, self._root)
        name = caption_name(image)
        if len(name) > MAX_NAME_BYTES:
            raise LeftOut("unusable_name", f"{os.fsdecode(name)!a} is too long for a file's name")
        if folders[:1] == [os.fsencode(FOLDER)]:
            raise LeftOut("unusable_name", f"{FOLDER} is where exports keep their record")
        text = (row.caption or "").encode()
        digest = hashlib.sha256(text).digest()
        self._waiting.append(_Sidecar(row, tuple(folders), name, text, digest))
        if len(self._waiting) == _GROUP:
            self._flush()

    def close(self) -> None:
        """Write those that wait."""
        self._flush()
        self._sync()

    def abandon(self) -> None:
        """Let go of the folder; what waits is not written."""
        self._folders.close()
        self._written.close()

    def _flush(self) -> None:
        known = self._written.enter([one.entry for one in self._waiting])
        ready = []
        for number, (one, digests) in enumerate(zip(self._waiting, known, strict=True)):
            scratch = f"{self._written.scratch}/{number}"
            with self._reported(one, is_entered=digests is not None):
                there = self._judge(one, digests)
                if there == one.digest:
                    self._note(one, "same", ours=one.digest in (digests or ()))
                    continue
                with open(scratch, "wb") as stream:
                    stream.write(one.text)
                ready.append((one, scratch, there))
        self._waiting.clear()
        self._sync()
        for one, scratch, there in ready:
            with self._reported(one, is_entered=True):
                self._place(one, scratch, there)
                self._note(one, "new" if there is None else "replaced", ours=True)

    @contextmanager
    def _reported(self, one: _Sidecar, *, is_entered: bool) -> Iterator[None]:
        """Leave the row out if it cannot be written, and stop if nothing can."""
        try:
            yield
        except LeftOut as error:
            self._report.leave_out(one.row, error)
            if is_entered:
                self._not_ours.append(one.entry)
        except OSError as error:
            raise write_failure(self._root / os.fsdecode(one.path), error) from error

    def _note(self, one: _Sidecar, fate: str, *, ours: bool) -> None:
        self.fates[fate] += 1
        (self._ours if ours else self._not_ours).append(one.entry)

    def _sync(self) -> None:
        """Make what was written durable, and only then forget what was there before.

        One sync for some hundred files: one for each would take hours for a large set.
        """
        with write_errors(self._root):
            os.sync()
        self._written.settle(self._ours, self._not_ours)
        self._ours.clear()
        self._not_ours.clear()

    def _judge(self, one: _Sidecar, digests: frozenset[bytes] | None) -> bytes | None:
        """The digest of what is there and may be replaced, or ``None``. Raises: LeftOut."""
        shown = ascii(os.fsdecode(one.path))
        if digests is None:
            raise LeftOut("name_taken", f"another line's caption is in {shown} already")
        there = _digest_of(self._folders.open(one.folders), one.name)
        if there in {None, one.digest} or there in digests or self._overwrite:
            return there
        raise LeftOut(
            "not_overwritten",
            f"{shown} was written or changed by somebody else; --overwrite replaces it",
        )

    def _place(self, one: _Sidecar, scratch: str, there: bytes | None) -> None:
        folder = self._folders.open(one.folders)
        shown = ascii(os.fsdecode(one.path))
        if there is not None and _digest_of(folder, one.name) != there:
            raise LeftOut("not_overwritten", f"{shown} was changed this moment")
        try:
            move_into(scratch, folder, one.name, overwrite=there is not None)
        except FileExistsError:
            raise LeftOut("not_overwritten", f"{shown} appeared this moment") from None
        except IsADirectoryError:
            raise LeftOut("unusable_name", f"{shown} is a folder") from None


class _Folders:
    """Opens folders below a root, making them where they are missing; the last one stays open."""

    def __init__(self, root: Path) -> None:
        with write_errors(root):
            self._root = os.open(root, _FOLDER_FLAGS)
        self._last: tuple[bytes, ...] = ()
        self._open = self._root

    def open(self, parts: tuple[bytes, ...]) -> int:
        """The descriptor of a folder, good until the next call. Raises: LeftOut, OSError."""
        if parts == self._last:
            return self._open
        self._let_go()
        descriptor = self._root
        with ExitStack() as passed:
            for index, part in enumerate(parts):
                descriptor = _step(descriptor, part, b"/".join(parts[: index + 1]))
                if index < len(parts) - 1:
                    passed.callback(os.close, descriptor)
        self._last, self._open = parts, descriptor
        return descriptor

    def close(self) -> None:
        self._let_go()
        os.close(self._root)

    def _let_go(self) -> None:
        if self._open != self._root:
            os.close(self._open)
        self._last, self._open = (), self._root


def _step(folder: int, name: bytes, path: bytes) -> int:
    try:
        return os.open(name, _FOLDER_FLAGS, dir_fd=folder)
    except FileNotFoundError:
        os.mkdir(name, dir_fd=folder)
        return os.open(name, _FOLDER_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno not in {errno.ENOTDIR, errno.ELOOP}:
            raise
        raise LeftOut(
            "unusable_name", f"{os.fsdecode(path)!a} is a link or a file, not a folder"
        ) from None


def _digest_of(folder: int, name: bytes) -> bytes | None:
    """The digest of a file, ``None`` if nothing is there, empty for what no export writes."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EACCES}:
            return b""
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_OWN_BYTES:
            return b""
        with open(descriptor, "rb", closefd=False) as stream:
            return hashlib.sha256(stream.read()).digest()
    finally:
        os.close(descriptor)
