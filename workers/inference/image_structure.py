"""What a file's own structure says, before any decoder allocates for it.

These checks exist because decoders are trusting: some reserve the canvas before anyone can look at
its size, inflate metadata, or spend hours on a crafted header. They read only headers and checksums
and cost next to nothing for an honest file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from shared.errors import ImageTooLarge, ImageTruncated, ImageUnreadable

MAX_PNG_CHUNKS = 100_000
MAX_PNG_METADATA_BYTES = 1024 * 1024
"""Most that one compressed PNG text or colour profile may inflate to; Pillow's own limit."""
MAX_JPEG_SCANS = 100
"""Honest progressive files have about ten; each costs a pass over every pixel."""
MAX_JPEG_SEGMENTS = 1000
"""Most that are looked at before the first scan; honest files have a dozen."""
MAX_TIFF_TAGS = 4096
MAX_TIFF_VALUES = 262_144
"""Most numbers in one tag, such as the offsets of strips."""


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image of more than ``max_pixels``. Raises: ImageTooLarge."""
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels, more than the {max_pixels:,} this server "
            "accepts; scale it down"
        )


# --- JPEG -------------------------------------------------------------------------------------


def check_jpeg(data: bytes) -> None:
    """Refuse files made of very many scans. Raises: ImageUnreadable."""
    if not is_one_scan(data) and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ImageUnreadable(
            f"the JPEG has more than {MAX_JPEG_SCANS} scans; save it again as a plain JPEG"
        )


_SEQUENTIAL = frozenset({0xC0, 0xC1})
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_START_OF_SCAN = 0xDA
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDA), 0xFF})
"""Markers that stand alone, and fill bytes: a decoder takes what follows them for a marker."""


def is_one_scan(data: bytes) -> bool:
    """Whether the first scan of a sequential JPEG holds all its components.

    A decoder reads no further then and keeps no coefficients, and nobody needs to look for more
    scans in megabytes of pixels. Anything unusual on the way there answers no: whoever walks the
    segments otherwise than the decoder does can be shown another image than it.
    """
    start, components = 2, None
    for _ in range(MAX_JPEG_SEGMENTS):
        if start + 5 > len(data) or data[start] != 0xFF or data[start + 1] in _WITHOUT_LENGTH:
            break
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == _START_OF_SCAN:
            return components is not None and data[start + 4] == components
        if marker in _FRAMES:
            if marker not in _SEQUENTIAL or components is not None or start + 10 > len(data):
                return False
            components = data[start + 9]
        start += 2 + length
    return False


# --- PNG --------------------------------------------------------------------------------------


def check_png(data: bytes, max_pixels: int) -> None:
    """Check size, completeness, every checksum, and what metadata would inflate to.

    Raises: ImageTooLarge, ImageTruncated or ImageUnreadable.
    """
    if len(data) < 24:
        raise ImageTruncated
    width, height = struct.unpack_from(">II", data, 16)
    check_pixels(width, height, max_pixels)
    for kind, body in _png_chunks(data):
        if kind in _PNG_COMPRESSED and _inflates_past_limit(_compressed_part(kind, body)):
            raise ImageTooLarge(
                f"the PNG's {kind.decode()} metadata is larger than "
                f"{MAX_PNG_METADATA_BYTES:,} bytes; save it without metadata"
            )


_PNG_COMPRESSED = frozenset({b"zTXt", b"iTXt", b"iCCP"})


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view = memoryview(data)
    start = 8
    for _ in range(MAX_PNG_CHUNKS):
        if start + 12 > len(data):
            raise ImageTruncated
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if end + 4 > len(data):
            raise ImageTruncated
        body = view[start + 8 : end]
        if zlib.crc32(body, zlib.crc32(kind)) != struct.unpack_from(">I", data, end)[0]:
            raise ImageUnreadable("the PNG is damaged: a checksum in it is wrong; copy it again")
        yield kind, body
        if kind == b"IEND":
            return
        start = end + 4
    raise ImageUnreadable(f"the PNG has more than {MAX_PNG_CHUNKS:,} chunks; save it again")


def _compressed_part(kind: bytes, body: memoryview) -> bytes:
    text = bytes(body)
    _keyword, _, rest = text.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    if rest[:1] != b"\x01":
        return b""
    return rest[2:].split(b"\0", 2)[-1]


def _inflates_past_limit(compressed: bytes) -> bool:
    inflater = zlib.decompressobj()
    try:
        return (
            len(inflater.decompress(compressed, MAX_PNG_METADATA_BYTES + 1))
            > MAX_PNG_METADATA_BYTES
        )
    except zlib.error:
        # Broken metadata is nothing a caption needs; the decoder skips it as well.
        return False


def check_png_rows(data: bytes) -> None:
    """Inflate the pixels of a PNG that passed :func:`check_png` and see that no row is missing.

    Costs half as much as decoding. Raises: ImageTruncated.
    """
    missing = _png_raw_bytes(data)
    inflater = zlib.decompressobj()
    for kind, body in _png_chunks(data):
        piece: bytes | memoryview = body if kind == b"IDAT" else b""
        while piece and missing > 0 and not inflater.eof:
            missing -= len(inflater.decompress(piece, _INFLATE_BYTES))
            piece = inflater.unconsumed_tail
    while missing > 0 and (rest := inflater.decompress(b"", _INFLATE_BYTES)):
        missing -= len(rest)
    if missing > 0:
        raise ImageTruncated


_INFLATE_BYTES = 1024 * 1024
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_WHOLE = ((0, 0, 1, 1),)
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""The passes of an interlaced PNG: first column and row, then the steps to the next."""


def _png_raw_bytes(data: bytes) -> int:
    width, height, depth, kind, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _PNG_CHANNELS[kind]
    total = 0
    for left, top, across, down in _ADAM7 if interlaced else _WHOLE:
        columns = max(0, -(-(width - left) // across))
        rows = max(0, -(-(height - top) // down))
        # Every row starts with one byte that names its filter.
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


# --- WebP -------------------------------------------------------------------------------------


def check_webp(data: bytes, max_pixels: int) -> None:
    """Check size and completeness; the decoder allocates its canvas as soon as it is made.

    Raises: ImageTooLarge, ImageTruncated or ImageUnreadable.
    """
    if len(data) < 30 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise ImageTruncated
    width, height = _webp_size(data)
    check_pixels(width, height, max_pixels)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ImageUnreadable("the WebP file starts with an unknown part; save it again")


# --- TIFF -------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _COMPRESSION, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 259, 322, 323
_DATA_OFFSETS, _DATA_COUNTS = (273, 324), (279, 325)
_TIFF_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32773, 32946})
"""None, CCITT, LZW, JPEG, Deflate, PackBits: what cameras, scanners and editors write."""
_TIFF_NUMBERS = {3: "H", 4: "I", 13: "I", 16: "Q"}
_TIFF_BYTES = frozenset({1, 2, 6, 7})


class _TiffLayout(NamedTuple):
    """How classic TIFF and BigTIFF differ: struct codes of a count and of a tag's entry."""

    number: str
    entry: str
    inline: int


_CLASSIC = _TiffLayout("H", "HHI", 4)
_BIG = _TiffLayout("Q", "HHQ", 8)


def check_tiff(data: bytes, max_pixels: int) -> None:
    """Check the first directory: size, tiles, compression, and that all pixel data is there.

    Raises: ImageTooLarge, ImageTruncated or ImageUnreadable.
    """
    try:
        tags = _tiff_directory(data)
    except struct.error:
        raise ImageTruncated from None
    check_pixels(_first(tags, _WIDTH), _first(tags, _HEIGHT), max_pixels)
    # A decoder reserves a whole tile, however small the image is that it belongs to.
    check_pixels(_first(tags, _TILE_WIDTH), _first(tags, _TILE_HEIGHT), max_pixels)
    if _first(tags, _COMPRESSION) not in _TIFF_COMPRESSIONS:
        raise ImageUnreadable("the TIFF's compression is not supported; save it as PNG or JPEG")
    for offsets, counts in zip(_DATA_OFFSETS, _DATA_COUNTS, strict=True):
        pieces = zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)
        if any(offset + count > len(data) for offset, count in pieces):
            raise ImageTruncated


_TIFF_TAGS = frozenset(
    {_WIDTH, _HEIGHT, _COMPRESSION, _TILE_WIDTH, _TILE_HEIGHT, *_DATA_OFFSETS, *_DATA_COUNTS}
)


def _first(tags: dict[int, tuple[int, ...]], tag: int) -> int:
    return next(iter(tags.get(tag, ())), 1)


def _tiff_directory(data: bytes) -> dict[int, tuple[int, ...]]:
    order = "<" if data[:2] == b"II" else ">"
    layout = _BIG if struct.unpack_from(order + "H", data, 2)[0] == 43 else _CLASSIC
    start = (
        struct.unpack_from(order + "Q", data, 8)[0]
        if layout is _BIG
        else struct.unpack_from(order + "I", data, 4)[0]
    )
    number = struct.unpack_from(order + layout.number, data, start)[0]
    if number > MAX_TIFF_TAGS:
        raise ImageUnreadable(f"the TIFF has more than {MAX_TIFF_TAGS} tags; save it again")
    start += struct.calcsize(order + layout.number)
    size = struct.calcsize(order + layout.entry) + layout.inline
    tags: dict[int, tuple[int, ...]] = {}
    for position in range(start, start + number * size, size):
        tag, kind, count = struct.unpack_from(order + layout.entry, data, position)
        if kind not in _TIFF_BYTES and count > MAX_TIFF_VALUES:
            raise ImageUnreadable("the TIFF has a tag with too many values; save it again")
        if tag in _TIFF_TAGS and kind in _TIFF_NUMBERS:
            where = position + size - layout.inline
            tags[tag] = _tiff_values(data, order, layout, where, f"{count}{_TIFF_NUMBERS[kind]}")
    return tags


def _tiff_values(
    data: bytes, order: str, layout: _TiffLayout, where: int, code: str
) -> tuple[int, ...]:
    if struct.calcsize(order + code) > layout.inline:
        where = struct.unpack_from(order + ("Q" if layout is _BIG else "I"), data, where)[0]
    return struct.unpack_from(order + code, data, where)
