"""Broken pictures, made from whole ones and a seed: the same seed breaks the same way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

Mutation = Callable[[bytearray, random.Random], bytes]

_OTHER_FILES = (
    b"",
    b"This is not a picture.\n",
    b"PK\x03\x04" + bytes(200),
    b"\x89PNG\r\n\x1a\n" + bytes(64),
    b"GIF89a\xff\xff\xff\xff" + bytes(64),
    b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(64),
    b"II*\x00\xff\xff\xff\xff" + bytes(64),
    b"%PDF-1.7\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\xff\xd8\xff",
)
_FRAME_HEADER = b"\xff\xc0"


def mutated(data: bytes, seed: int) -> bytes:
    """One broken form of an encoded JPEG. Some are still readable: bytes of pixel data may differ."""
    source = random.Random(seed)
    return source.choice(_MUTATIONS)(bytearray(data), source)


def write_mutated(folder: Path, originals: Sequence[Path], count: int) -> list[Path]:
    """Write ``count`` broken pictures; number N has the seed N."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"mutated-{number:05d}.jpg"
        path.write_bytes(mutated(originals[number % len(originals)].read_bytes(), number))
        paths.append(path)
    return paths


def _flip(data: bytearray, source: random.Random) -> bytes:
    for _ in range(source.choice((1, 4, 64, 1024))):
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    return bytes(data)


def _flip_in_header(data: bytearray, source: random.Random) -> bytes:
    for _ in range(source.choice((1, 4, 16))):
        data[source.randrange(min(700, len(data)))] = source.randrange(256)
    return bytes(data)


def _truncate(data: bytearray, source: random.Random) -> bytes:
    return bytes(data[: source.randrange(len(data))])


def _cut_out(data: bytearray, source: random.Random) -> bytes:
    first = source.randrange(len(data))
    del data[first : first + source.randrange(1, 4096)]
    return bytes(data)


def _repeat(data: bytearray, source: random.Random) -> bytes:
    first = source.randrange(len(data))
    piece = data[first : first + source.randrange(1, 4096)]
    return bytes(data[:first] + piece * source.randrange(2, 50) + data[first:])


def _zero(data: bytearray, source: random.Random) -> bytes:
    first = source.randrange(len(data))
    size = min(source.randrange(1, 8192), len(data) - first)
    data[first : first + size] = bytes(size)
    return bytes(data)


def _other_size(data: bytearray, source: random.Random) -> bytes:
    """Another width and height in the JPEG's header: 0, odd ones, far too large ones."""
    place = data.find(_FRAME_HEADER) + 5
    for offset in (0, 2):
        size = source.choice((0, 1, 447, 449, 3000, 65535))
        data[place + offset : place + offset + 2] = size.to_bytes(2, "big")
    return bytes(data)


def _other_file(_: bytearray, source: random.Random) -> bytes:
    return source.choice(_OTHER_FILES)


def _noise(data: bytearray, source: random.Random) -> bytes:
    return source.randbytes(len(data))


_MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _flip_in_header,
    _truncate,
    _cut_out,
    _repeat,
    _zero,
    _other_size,
    _other_file,
    _noise,
)
