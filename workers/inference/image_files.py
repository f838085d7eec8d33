"""Read images from disk: from the configured roots for everyone, from uploads by path.

A request's path is resolved first, and the file that was really opened is checked again through its
descriptor, so a symbolic link, ``..`` or a rename in between cannot lead out of the roots. Outside
of them the answer is always the same, whether or not a file is there. Linux only (``/proc``).

Hard links are not seen through: whoever can make them in a root decides what is readable.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shared.errors import (
    ImageChanged,
    ImageError,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    StorageFailed,
)

MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO})
SHOWN_CHARACTERS = 200
_READ_BYTES = 1 << 20


def shown(text: str) -> str:
    """``text`` as a message may repeat it: one line, not too long."""
    return ascii(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…")


class Seen(NamedTuple):
    """A file as it was when somebody looked: its bytes, and when it was last written."""

    size: int
    mtime_ns: int

    def check(self, descriptor: int, name: str) -> None:
        """Raise ImageChanged unless the open file is still so."""
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != self:
            raise ImageChanged(
                f"{shown(name)} is not the file that it was when the image set was listed; retry "
                "it once nobody writes to it any more"
            )


class WrittenBy(NamedTuple):
    """A file that nobody wrote to after this time (Unix seconds)."""

    time_s: float

    def check(self, descriptor: int, name: str) -> None:
        """Raise ImageChanged if somebody did."""
        if os.fstat(descriptor).st_mtime > self.time_s:
            raise ImageChanged(f"{shown(name)} was written to since")


class ImageRoots:
    """The folders that requests may name files in."""

    def __init__(self, roots: tuple[Path, ...], max_bytes: int) -> None:
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._max_bytes = max_bytes

    def read(self, path: str, seen: Seen | WrittenBy | None = None) -> bytes:
        """The bytes of the file at this absolute path.

        Raises: ImageForbidden, ImageNotFound, ImageTooLarge; ImageChanged if it is not as it was
        ``seen``; StorageFailed if the disk fails.
        """
        with self.opened(path) as descriptor:
            if seen is not None:
                seen.check(descriptor, path)
            return _read_regular(descriptor, path, self._max_bytes)

    def read_in(self, folder: int, name: str, path: str, seen: Seen) -> bytes:
        """The bytes of the file ``name`` in an open folder, which is no link; ``path`` is all of it.

        Quicker than ``read`` for many files of one folder. Raises: as ``read``.
        """
        descriptor = _open(name, path, os.O_NOFOLLOW, folder)
        try:
            self._require_inside(descriptor, path)
            seen.check(descriptor, path)
            return _read_regular(descriptor, path, self._max_bytes)
        finally:
            os.close(descriptor)

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """The file at this absolute path, open to be read. Raises: as ``read``."""
        descriptor = self._open(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def resolve(self, path: str) -> str:
        """The absolute path without links of what lies in a root. Raises: ImageForbidden."""
        if not self._roots:
            raise ImageForbidden(
                "this server reads no images from its disk; upload the image to /v1/files, or let "
                "the operator name folders in the setting images.roots"
            )
        if "\0" in path or not path.startswith("/") or ".." in path.split("/"):
            raise ImageForbidden(
                f"the path {shown(path)} is not allowed: it must be absolute and without '..'"
            )
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            # Changed while it was followed, or no text that a file name can be.
            raise self._outside(path) from None
        if not self._holds(real):
            raise self._outside(path)
        return real

    def _open(self, path: str) -> int:
        # A link put in place of the file after it was resolved must not be followed.
        descriptor = _open(self.resolve(path), path, os.O_NOFOLLOW)
        try:
            self._require_inside(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_inside(self, descriptor: int, path: str) -> None:
        if not self._holds(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise self._outside(path)

    def _holds(self, real: str) -> bool:
        return any(
            real == root or real.startswith(root if root.endswith("/") else root + "/")
            for root in self._roots
        )

    def _outside(self, path: str) -> ImageError:
        return ImageForbidden(
            f"the path {shown(path)} is not inside a folder that this server may read images from "
            "(the setting images.roots); upload the image to /v1/files instead"
        )


def read_file(path: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of a trusted path; ``name`` is what messages call it.

    Raises: ImageNotFound, ImageForbidden, ImageTooLarge; StorageFailed if the disk fails.
    """
    descriptor = _open(str(path), name)
    try:
        return _read_regular(descriptor, name, max_bytes)
    finally:
        os.close(descriptor)


def _open(path: str, name: str, flags: int = 0, folder: int | None = None) -> int:
    # Without O_NONBLOCK the open of a named pipe would wait for a writer for ever.
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in MISSING:
            raise ImageNotFound(f"there is no image at {shown(name)}") from None
        if error.errno in REFUSED:
            raise ImageForbidden(f"the server may not read {shown(name)}") from None
        raise StorageFailed(f"reading {shown(name)} failed: {error.strerror}") from error


def _read_regular(descriptor: int, name: str, max_bytes: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ImageForbidden(f"{shown(name)} is not a regular file")
    try:
        # One more than allowed: the file may grow after its size was asked.
        data = (
            b"" if status.st_size > max_bytes else _read(descriptor, status.st_size, max_bytes + 1)
        )
    except OSError as error:
        raise StorageFailed(f"reading {shown(name)} failed: {error.strerror}") from error
    if max(status.st_size, len(data)) > max_bytes:
        raise ImageTooLarge(
            f"{shown(name)} has more than the {max_bytes:,} bytes this server accepts for an image"
        )
    return data


def _read(descriptor: int, expected: int, limit: int) -> bytes:
    """What an open file holds, up to ``limit`` bytes; quickest if it has ``expected``.

    A buffered file would ask for room of ``limit`` first, which takes longer than reading a small one.
    """
    data = os.read(descriptor, min(expected + 1, limit))
    while len(data) < limit and (more := os.read(descriptor, min(_READ_BYTES, limit - len(data)))):
        data += more
    return data
