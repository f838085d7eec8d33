"""The members of a tar archive by their headers alone: names, kinds, and where the bytes are.

Reads headers of the old, the GNU and the POSIX kind in the order of the file, from any header on, and
nothing else; memory does not grow with the archive. Every length is checked against the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from shared.errors import ImageSetUnreadable
from workers.inference.archive_names import decode_name

BLOCK = 512
_MAX_EXTRA = 1 << 20
"""Most bytes of a header that follows a header; honest ones have a few hundred."""
_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_FILES = frozenset({b"0", b"\0", b"7"})
_FOLDER = b"5"
_LINKS = frozenset({b"1", b"2"})

MemberKind = Literal["file", "folder", "link", "other"]


class TarMember(NamedTuple):
    """A member: its first header's place, its bytes' place, and the place of the next header."""

    name: str
    kind: MemberKind
    header: int
    offset: int
    size: int
    following: int


def read_tar(stream: BinaryIO, start: int, end: int) -> Iterator[TarMember]:
    """The members from the header at ``start`` on; ``end`` is the size of the archive.

    Raises: ImageSetUnreadable where it is damaged, by the position; OSError.
    """
    at = start
    while at < end:
        first, name, size, sparse = at, None, None, False
        while True:
            header = _header(stream, at, end)
            if header is None:
                return
            kind = header[156:157]
            own_size = _number(header[124:136], at)
            data, following = at + BLOCK, at + BLOCK + -(-own_size // BLOCK) * BLOCK
            if kind not in {_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_GLOBAL}:
                break
            extra = _extra(stream, data, own_size, end)
            if kind == _GNU_LONG_NAME:
                name = extra.split(b"\0", 1)[0]
            elif kind == _PAX:
                records = _pax(extra, at)
                name = records.get(b"path", name)
                if b"size" in records:
                    size = _decimal(records[b"size"], at)
                sparse = any(key.startswith(b"GNU.sparse") for key in records)
            at = following
        if size is not None:
            own_size = size
            following = data + -(-own_size // BLOCK) * BLOCK
        if name is None:
            name = _name(header)
        if data + own_size > end:
            raise _damaged(first, f"it ends in the middle of {decode_name(name)!a}")
        yield TarMember(
            decode_name(name), _kind(kind, sparse=sparse), first, data, own_size, following
        )
        at = following


def is_tar(start: bytes) -> bool:
    """Whether a file's first 512 bytes are a header of a tar."""
    return len(start) == BLOCK and _has_checksum(start)


def _header(stream: BinaryIO, at: int, end: int) -> bytes | None:
    """The header at a position; ``None`` at the end mark, or at the end of the file."""
    stream.seek(at)
    header = stream.read(BLOCK)
    if not header or (header[0] == 0 and not header.strip(b"\0")):
        return None
    if len(header) < BLOCK or at + BLOCK > end:
        raise _damaged(at, "it ends in the middle of a header")
    if not _has_checksum(header):
        raise _damaged(at, "what is there is no header")
    return header


def _has_checksum(header: bytes) -> bool:
    try:
        told = int(header[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return told == sum(header) - sum(header[148:156]) + 8 * 32


def _extra(stream: BinaryIO, at: int, size: int, end: int) -> bytes:
    if size > _MAX_EXTRA or at + size > end:
        raise _damaged(at, "a header has an absurd size")
    stream.seek(at)
    return stream.read(size)


def _pax(extra: bytes, at: int) -> dict[bytes, bytes]:
    """The records of a POSIX header: length, key, value and an end of line each."""
    records: dict[bytes, bytes] = {}
    rest = extra.rstrip(b"\0")
    while rest:
        digits, space, _ = rest.partition(b" ")
        length = _decimal(digits, at)
        key, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
        if not space or not equals or not len(digits) + 1 < length <= len(rest):
            raise _damaged(at, "a header's records make no sense")
        records[key] = value
        rest = rest[length:]
    return records


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    # Only POSIX headers have a prefix there; GNU's old ones have times.
    if prefix and header[257:263] == b"ustar\0":
        return prefix + b"/" + name
    return name


def _kind(flag: bytes, *, sparse: bool) -> MemberKind:
    if flag in _FILES and not sparse:
        return "file"
    if flag == _FOLDER:
        return "folder"
    return "link" if flag in _LINKS else "other"


def _number(field: bytes, at: int) -> int:
    """A size: octal digits, or bytes behind a mark for those that are larger."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or max(digits) > ord("7"):
        raise _damaged(at, "a header's size is no number")
    return int(digits, 8)


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _damaged(at, "a header's records make no sense")
    return int(digits)


def _damaged(at: int, why: str) -> ImageSetUnreadable:
    return ImageSetUnreadable(f"the tar is damaged at byte {at:,}: {why}; pack or copy it anew")
