"""What all listings of image sets share: what they find, what they may use, and names of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shared.captions import Entry, Place
from workers.inference.image_files import ImageRoots
from workers.inference.image_sources import OpenUpload

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    # Not read, but images all the same: each is told about by an error line of its own.
    | {".heic", ".heif", ".avif", ".jxl"}
)
ARCHIVE_SUFFIXES = frozenset({".tar", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})


class Found(NamedTuple):
    """An entry, its place, and where a listing goes on behind it (a JSON value).

    ``passed``: a sync leaves it out.
    """

    entry: Entry
    place: Place
    cursor: Any
    passed: bool = False


class Surroundings(msgspec.Struct, frozen=True):
    """What a listing may use.

    ``scratch`` is a folder that goes when the listing ends. ``keep_going`` is called every few
    thousand names and may raise to stop. ``columns`` are those whose texts the template needs.
    """

    roots: ImageRoots
    open_upload: OpenUpload
    scratch: Path
    keep_going: Callable[[], None]
    max_image_bytes: int
    columns: tuple[str, ...]


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return _suffix(name) in IMAGE_SUFFIXES


def is_archive_name(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return _suffix(name) in ARCHIVE_SUFFIXES


def is_set_name(name: str) -> bool:
    """Whether a file holds images, as an archive or table, by its name."""
    return is_archive_name(name) or _suffix(name) in TABLE_SUFFIXES


def _suffix(name: str) -> str:
    # Quicker than splitext, and these are asked millions of times.
    return name[name.rfind(".") :].lower()
