"""The images and texts that the entries of an image set name, read as they were listed.

A folder's files are read below the image roots only, an archive's members by their offset. What is
not as it was when the set was listed is an error of that entry.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence

from shared.captions import Entry, Place, unescape_name
from shared.errors import ImageError, ImageNotFound, ImageTooLarge, TextMissing
from shared.settings import ImageSettings
from workers.inference.image_files import ImageRoots, Seen, read_file, shown
from workers.inference.image_sources import OpenUpload

MAX_SIDECAR_BYTES = 1 << 20


class EntryImages:
    """Reads for one owner. Every method may raise StorageFailed if the disk fails."""

    def __init__(self, settings: ImageSettings, open_upload: OpenUpload) -> None:
        self._roots = ImageRoots(settings.roots, settings.max_bytes)
        self._texts = ImageRoots(settings.roots, MAX_SIDECAR_BYTES)
        self._max_bytes = settings.max_bytes
        self._open_upload = open_upload

    def load(self, entry: Entry, place: Place) -> bytes:
        """The encoded image, not yet looked at. Raises: ImageError."""
        if place.file is not None:
            return read_file(self._open_upload(place.file), entry.name, self._max_bytes)
        return self._roots.read(path_of(entry, place), _seen(entry))

    def texts(self, entry: Entry, place: Place, columns: Sequence[str]) -> dict[str, str]:
        """The texts of the columns that this entry has. Raises: TextMissing if one is unusable."""
        found = dict(entry.texts or {})
        for column in columns:
            if column not in found:
                text = self._sidecar(entry, place, column)
                if text is not None:
                    found[column] = text
        return found

    def _sidecar(self, entry: Entry, place: Place, column: str) -> str | None:
        kind, _, field = column.partition(".")
        data = self._sidecar_bytes(entry, place, kind)
        return None if data is None else sidecar_text(data, column, field)

    def _sidecar_bytes(self, entry: Entry, place: Place, kind: str) -> bytes | None:
        if place.type not in {"folder", "list", "image"} or place.file is not None:
            return None
        path = path_of(entry, place)
        try:
            return self._texts.read(f"{posixpath.splitext(path)[0]}.{kind}")
        except ImageNotFound:
            return None
        except ImageTooLarge:
            raise TextMissing(
                f"the .{kind} beside {shown(entry.name)} has more than {MAX_SIDECAR_BYTES:,} bytes",
                param="template",
            ) from None
        except ImageError as error:
            raise TextMissing(error.message, param="template") from None


def path_of(entry: Entry, place: Place) -> str:
    """The path of an entry that is a file of its own."""
    if entry.path is not None:
        return unescape_name(entry.path)
    assert place.path is not None, "a file has a path"
    name = unescape_name(entry.name.removeprefix(place.prefix))
    return posixpath.join(unescape_name(place.path), name)


def sidecar_text(data: bytes, column: str, field: str) -> str | None:
    """The text of a sidecar, or of a ``field`` of the JSON object in it; without that ``None``.

    Raises: TextMissing if the file holds no such thing.
    """
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text) if field else text.strip()
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise TextMissing(
            f"the file for {{{column}}} cannot be read: {error}", param="template"
        ) from None
    for part in field.split(".") if field else ():
        value = value.get(part) if isinstance(value, dict) else None
    return as_text(value)


def as_text(value: object) -> str | None:
    """A value of a table or of JSON as a prompt shows it; ``None`` stays so."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _seen(entry: Entry) -> Seen | None:
    if entry.size is None or entry.mtime_ns is None:
        return None
    return Seen(entry.size, entry.mtime_ns)
