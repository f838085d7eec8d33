"""Image sets for tests: archives of every kind, and listing them without a node."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from shared.captions import CaptionSource, ImagePlace
from workers.inference.image_files import ImageRoots
from workers.inference.listing_base import Found, Surroundings
from workers.inference.listing_sources import find_images

MAX_BYTES = 1 << 20


def jpeg(number: int = 1, size: tuple[int, int] = (16, 12)) -> bytes:
    """A picture of its own colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number * 7 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def write(path: Path, data: bytes | str = b"") -> Path:
    """A file, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tar(path: Path, members: Iterable[tuple[str, bytes]], **options: Any) -> Path:
    """A tar of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zipped(path: Path, members: Iterable[tuple[str, bytes]], *, packed: bool = True) -> Path:
    """A zip of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def source(*places: ImagePlace | Path | str, template: str | None = None) -> CaptionSource:
    """A caption job over these places."""
    images = [
        place if isinstance(place, ImagePlace) else ImagePlace(path=str(place)) for place in places
    ]
    prompt = None if template else "say it"
    return CaptionSource(images=images, model="echo", prompt=prompt, template=template)


def surroundings(
    root: Path, scratch: Path, *, columns: tuple[str, ...] = (), uploads: Path | None = None
) -> Surroundings:
    """What a listing may use: images below ``root``, uploads by their ids in a folder."""
    scratch.mkdir(exist_ok=True)
    return Surroundings(
        roots=ImageRoots((root,), MAX_BYTES),
        open_upload=lambda file_id: (uploads or root) / file_id,
        scratch=scratch,
        keep_going=lambda: None,
        max_image_bytes=MAX_BYTES,
        columns=columns,
    )


def listed(asked: CaptionSource, around: Surroundings, after: object = None) -> Iterator[Found]:
    """What a listing finds."""
    return find_images(asked, after, around)
