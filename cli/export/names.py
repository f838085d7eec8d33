"""Where a row's files go below a folder: never outside of it, whatever a name says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from cli.export.writing import LeftOut
from shared.captions import unescape_name
from shared.result_rows import ResultRow

MAX_NAME_BYTES = 255
_MAX_FOLDERS = 256
_NO_TEXT = re.compile(r"[\ud800-\udfff]")
_IMAGE_SUFFIXES = frozenset(
    b"jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif ppm".split()
)


class Names:
    """Tells the names of a batch's images; ``is_set`` says that the server wrote them for a set."""

    def __init__(self, *, is_set: bool) -> None:
        self.is_set = is_set

    def plain(self, name: str) -> str:
        """A name as Python has those of files; bytes that are no text are lone surrogates."""
        return unescape_name(name) if self.is_set else name

    def text(self, name: str) -> str:
        """A name as JSON can hold it. Raises: LeftOut."""
        plain = self.plain(name)
        if _NO_TEXT.search(plain):
            raise LeftOut("unusable_name", f"{plain!a} is no text, so this format cannot name it")
        return plain

    def below(self, row: ResultRow, root: Path) -> list[bytes]:
        """The parts of the path below ``root`` of the row's image. Raises: LeftOut.

        It is the image's own if that was named by a path inside ``root``, and else the custom_id.
        """
        folder = os.fsencode(root).rstrip(b"/") + b"/"
        path = self.encoded(file_path(row.image or ""))
        if path.startswith(folder):
            return _parts(path[len(folder) :])
        if row.custom_id is None:
            raise LeftOut("no_name", "the line has no custom_id to name a file by")
        return _parts(self.encoded(row.custom_id))

    def encoded(self, name: str) -> bytes:
        """A name as the kernel takes it. Raises: LeftOut if it cannot be the name of a file."""
        try:
            return os.fsencode(self.plain(name))
        except UnicodeEncodeError:
            raise LeftOut("unusable_name", f"{name!a} cannot be the name of a file") from None


def file_path(address: str) -> str:
    """The path in a ``file://`` URL; anything else as it is."""
    if address[:7].lower() != "file://":
        return address
    return "/" + unquote(address[7:].partition("/")[2], errors="surrogateescape")


def caption_name(image: bytes) -> bytes:
    """The name of the sidecar of an image: ``.txt`` in place of what image files end in."""
    stem, _, suffix = image.rpartition(b".")
    return (stem if stem and suffix.lower() in _IMAGE_SUFFIXES else image) + b".txt"


def _parts(name: bytes) -> list[bytes]:
    parts = name.split(b"/")
    if name.startswith(b"/"):
        what = "is an absolute path outside of the folder"
    elif b".." in parts or b"." in parts or b"" in parts:
        what = "holds '..', '.' or an empty part"
    elif b"\0" in name:
        what = "holds a NUL character"
    elif len(parts) > _MAX_FOLDERS or any(len(part) > MAX_NAME_BYTES for part in parts):
        what = "is too long or too deep"
    else:
        return parts
    shown = ascii(os.fsdecode(name[:200]))
    raise LeftOut("unusable_name", f"{shown} names nothing below the folder: it {what}")
