"""One member of a zip archive by its offset; it does not grow past what it should while inflated."""

from __future__ import annotations

import os
import struct
import zlib

from shared.errors import ImageTruncated, ImageUnreadable

_DEFLATED = 8
_LOCAL = struct.Struct("<4s2B4HL2L2H")
_SIZES_LATER = 0x8


def read_member(descriptor: int, offset: int, stored: int, size: int, name: str) -> bytes:
    """The bytes of the member whose local header is at ``offset``.

    Raises: ImageTruncated, ImageUnreadable, by the member's ``name``; OSError.
    """
    header = os.pread(descriptor, _LOCAL.size, offset)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        raise ImageUnreadable(f"{name} is not where the archive's directory says")
    fields = _LOCAL.unpack(header)
    flags, method, checksum = fields[3], fields[4], fields[7]
    data = os.pread(descriptor, stored, offset + _LOCAL.size + fields[10] + fields[11])
    if len(data) < stored:
        raise ImageTruncated(f"the archive ends in the middle of {name}")
    if method == _DEFLATED:
        data = _inflated(data, size, name)
    if len(data) != size:
        raise ImageUnreadable(f"{name} has not the size that the archive's directory says")
    if not flags & _SIZES_LATER and zlib.crc32(data) != checksum:
        raise ImageUnreadable(f"{name} is damaged: its checksum is wrong")
    return data


def _inflated(data: bytes, size: int, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ImageUnreadable(f"{name} is damaged in the archive: {error}") from None
    if len(inflated) > size:
        raise ImageUnreadable(f"{name} unpacks to more than the archive's directory says")
    return inflated
