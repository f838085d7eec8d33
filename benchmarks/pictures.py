"""A set of small JPEGs, made from their numbers alone: the same in every run, no two files alike.

A few hundred pictures are drawn and encoded; every file is one of them with its own number in a
comment inside the JPEG, so that a million are written in a minute. Some lie on their side, as
cameras write them, and some are cut short, as interrupted downloads are.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

DISTINCT = 256
"""Pictures that are drawn."""
BROKEN_EVERY = 1000
"""One file of so many is cut short."""
_BROKEN_REST = 7
_SIDES = (64, 72, 80, 96, 112, 128)
_QUALITY = 85
_START = b"\xff\xd8"
_COMMENT = b"\xff\xfe"
_PER_FOLDER = 1000
_FOLDERS = 100
_BUFFER_BYTES = 1 << 20


def name_of(number: int) -> str:
    """The path of a picture in its folder or archive, two folders deep; names are in order."""
    folder = number // _PER_FOLDER
    return f"{folder // _FOLDERS:03d}/{folder % _FOLDERS:02d}/{number:08d}.jpg"


def number_of(name: str) -> int:
    """What :func:`name_of` was given; what the names begin with does not matter."""
    return int(name[-12:-4])


def is_broken(number: int) -> bool:
    """Whether the file ends in the middle of its pixels."""
    return number % BROKEN_EVERY == _BROKEN_REST


class Pictures:
    """Makes the files."""

    def __init__(self) -> None:
        self._drawn = [_drawn(seed) for seed in range(DISTINCT)]

    def file(self, number: int) -> bytes:
        """The bytes of one JPEG."""
        drawn = self._drawn[number % DISTINCT]
        comment = f"picture {number}".encode()
        data = b"".join(
            (_START, _COMMENT, struct.pack(">H", len(comment) + 2), comment, drawn[len(_START) :])
        )
        return data[: len(data) * 3 // 4] if is_broken(number) else data


def write_folder(folder: Path, count: int) -> int:
    """Write ``count`` files below ``folder``; returns their bytes."""
    pictures, total = Pictures(), 0
    for number in range(count):
        path = f"{folder}/{name_of(number)}"
        if number % _PER_FOLDER == 0:
            Path(path).parent.mkdir(parents=True)
        data = pictures.file(number)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        total += len(data)
    return total


def write_tar(path: Path, count: int) -> int:
    """Write the same files as one tar; returns their bytes."""
    pictures, total = Pictures(), 0
    with open(path, "wb", buffering=_BUFFER_BYTES) as stream:
        for number in range(count):
            data = pictures.file(number)
            stream.writelines(_member(name_of(number), data))
            total += len(data)
        stream.write(bytes(2 * tarfile.BLOCKSIZE))
    return total


def _member(name: str, data: bytes) -> Iterator[bytes]:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    yield about.tobuf(tarfile.USTAR_FORMAT)
    yield data
    yield bytes(-len(data) % tarfile.BLOCKSIZE)


def _drawn(seed: int) -> bytes:
    """A picture with soft shapes and grain; every fourth one has to be turned."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.choice(_SIDES, 2))
    shapes = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8), "RGB")
    field = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    field = field + random.normal(0, 3, (height, width, 1)).astype(np.float32)
    picture = Image.fromarray(field.clip(0, 255).astype(np.uint8), "RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 2 + seed // 4 % 7 if seed % 4 == 0 else 1
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=_QUALITY, exif=exif)
    return encoded.getvalue()
