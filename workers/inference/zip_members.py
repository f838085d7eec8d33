"""The members of a zip archive by its directory alone, and their bytes by offset.

Python's own reader holds the whole directory in memory; this one streams it. Every length is checked
against the file, and no member grows past what is allowed while it is inflated.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from shared.errors import ImageSetUnreadable
from workers.inference.archive_names import decode_name

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4B4HL2L5H2L")
_MAX_COMMENT = 65535
_IN_EXTRA = 0xFFFFFFFF
_ENCRYPTED, _UTF8 = 0x1, 0x800
STORED, DEFLATED = 0, 8


class ZipMember(NamedTuple):
    """A member: where its local header is, what it takes there, and what its file has.

    ``position`` is that of its entry in the directory, ``following`` that of the next. One that
    ``is_outside`` would lie where no member can.
    """

    name: str
    position: int
    following: int
    offset: int
    stored: int
    size: int
    method: int
    is_encrypted: bool
    is_folder: bool
    is_link: bool
    is_other: bool
    is_outside: bool


class Directory(NamedTuple):
    """Where the directory is, and what its offsets are counted from."""

    start: int
    end: int
    base: int


def find_directory(stream: BinaryIO) -> Directory:
    """Find the directory from the end of the file. Raises: ImageSetUnreadable; OSError."""
    size = stream.seek(0, os.SEEK_END)
    tail_at = max(0, size - _END.size - _MAX_COMMENT)
    stream.seek(tail_at)
    tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise _damaged("it has no directory; it was probably not copied in full")
    _, _, _, _, _, length, offset, _ = _END.unpack_from(tail, at)
    end, length, offset = _directory_64(stream, tail_at + at, length, offset)
    start = end - length
    if start < 0 or start < offset:
        raise _damaged("its directory is not where it says")
    return Directory(start, end, start - offset)


def read_directory(
    stream: BinaryIO, directory: Directory, position: int | None = None
) -> Iterator[ZipMember]:
    """The members from the entry at ``position`` on. Raises: ImageSetUnreadable; OSError."""
    at = directory.start if position is None else position
    while at < directory.end:
        stream.seek(at)
        fixed = stream.read(_CENTRAL.size)
        if len(fixed) < _CENTRAL.size or not fixed.startswith(b"PK\x01\x02"):
            raise _damaged(f"its directory makes no sense at byte {at:,}")
        fields = _CENTRAL.unpack(fixed)
        flags, method, stored, size = fields[5], fields[6], fields[10], fields[11]
        name_length, extra_length, comment_length = fields[12:15]
        system, attributes, offset = fields[2], fields[17], fields[18]
        raw = stream.read(name_length)
        extra = stream.read(extra_length)
        if len(raw) < name_length or len(extra) < extra_length:
            raise _damaged("its directory was cut short")
        size, stored, offset = _large(extra, size, stored, offset)
        following = at + _CENTRAL.size + name_length + extra_length + comment_length
        name = _text(raw, flags, system)
        mode = stat.S_IFMT(attributes >> 16)
        yield ZipMember(
            name=name,
            position=at,
            following=following,
            offset=directory.base + offset,
            stored=stored,
            size=size,
            method=method,
            is_encrypted=bool(flags & _ENCRYPTED),
            is_folder=name.endswith("/") or mode == stat.S_IFDIR,
            is_link=mode == stat.S_IFLNK,
            is_other=mode not in {0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK},
            is_outside=directory.base + offset + stored > directory.start,
        )
        at = following


def _directory_64(stream: BinaryIO, end: int, length: int, offset: int) -> tuple[int, int, int]:
    """The end, length and offset of the directory of a large archive; as given if it is not."""
    stream.seek(max(0, end - _LOCATOR.size))
    locator = stream.read(_LOCATOR.size)
    if end < _LOCATOR.size + _END_64.size or not locator.startswith(b"PK\x06\x07"):
        return end, length, offset
    at = end - _LOCATOR.size - _END_64.size
    stream.seek(at)
    fields = _END_64.unpack(stream.read(_END_64.size))
    if fields[0] != b"PK\x06\x06":
        raise _damaged("its directory is not where it says")
    return at, fields[8], fields[9]


def _large(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """The three numbers, those that do not fit into 32 bits from the extra field."""
    values = [size, stored, offset]
    if _IN_EXTRA not in values:
        return size, stored, offset
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            place = at + 4
            for index, value in enumerate(values):
                if value == _IN_EXTRA and place + 8 <= min(len(extra), at + 4 + length):
                    [values[index]] = struct.unpack_from("<Q", extra, place)
                    place += 8
            break
        at += 4 + length
    return values[0], values[1], values[2]


def _text(raw: bytes, flags: int, system: int) -> str:
    name = raw.decode("utf-8", "replace") if flags & _UTF8 else decode_name(raw)
    # Some programs for Windows write its own kind of slash.
    return name.replace("\\", "/") if system == 0 else name


def _damaged(why: str) -> ImageSetUnreadable:
    return ImageSetUnreadable(f"the zip is damaged: {why}; pack or copy it anew")
