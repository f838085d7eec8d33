"""The images and texts that the entries of an image set name, read as they were listed.

A folder's files are read below the image roots only, an archive's members by their offset. What is
not as it was when the set was listed is an error of that entry.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from shared.captions import MAX_TEXT, Entry, Place, unescape_name
from shared.errors import (
    ConfigurationError,
    ImageError,
    ImageNotFound,
    ImageSetUnreadable,
    ImageTooLarge,
    ImageTruncated,
    ImageUnreadable,
    TextMissing,
)
from shared.settings import ImageSettings
from shared.storage import storage_errors
from shared.tables import TableRows, image_in
from shared.zip_reading import read_member
from workers.inference.image_files import ImageRoots, Seen, WrittenBy, read_file, shown
from workers.inference.image_sources import OpenUpload

MAX_SIDECAR_BYTES = 1 << 20
_MAX_OPEN = 4
"""Archives that stay open; entries come one archive after the other."""


class EntryImages:
    """Reads for one owner, one chunk after the other; close it when nobody reads any more.

    ``load_url`` gets an image from an image server. Files with texts that were written to after
    ``texts_until_s`` (Unix seconds) are not what they were. Every method may raise StorageFailed if the disk
    fails.
    """

    def __init__(
        self,
        settings: ImageSettings,
        open_upload: OpenUpload,
        load_url: Callable[[str], bytes],
        texts_until_s: float | None = None,
    ) -> None:
        self._roots = ImageRoots(settings.roots, settings.max_bytes)
        self._texts = ImageRoots(settings.roots, MAX_SIDECAR_BYTES)
        self._texts_seen = None if texts_until_s is None else WrittenBy(texts_until_s)
        self._max_bytes = settings.max_bytes
        self._open_upload = open_upload
        self._load_url = load_url
        self._opened: dict[Place, int] = {}
        self._rows: TableRows | None = None
        self._folder: tuple[str, int] | None = None

    def close(self) -> None:
        """Close the archives, and the folder, that are still open."""
        self._rows = None
        self._close_folder()
        while self._opened:
            os.close(self._opened.popitem()[1])

    def load(self, entry: Entry, place: Place) -> bytes:
        """The encoded image, not yet looked at. Raises: ImageError."""
        if entry.path is not None or place.type == "folder":
            return self._load_file(entry, place)
        if place.type == "image":
            assert place.file is not None, "an image has a path or is an upload"
            return read_file(self._open_upload(place.file), entry.name, self._max_bytes)
        assert entry.offset is not None, "a member has an offset"
        if place.type == "table":
            return self._load_cell(entry, place, entry.offset)
        assert entry.size is not None, "a member has a size"
        return self._load_member(place, entry.offset, entry.size, entry.stored, entry.name)

    def texts(self, entry: Entry, place: Place, columns: Sequence[str]) -> dict[str, str]:
        """The texts of the columns that this entry has. Raises: TextMissing if one is unusable."""
        found = dict(entry.texts or {})
        contents: dict[str, bytes | None] = {}
        for column in columns:
            if column in found:
                continue
            kind, _, field = column.partition(".")
            if kind not in contents:
                contents[kind] = self._sidecar_bytes(entry, place, kind)
            data = contents[kind]
            text = None if data is None else sidecar_text(data, column, field)
            if text is not None:
                found[column] = text
        return found

    def _load_file(self, entry: Entry, place: Place) -> bytes:
        path = path_of(entry, place)
        if is_url(path):
            return self._load_url(path)
        seen = _seen(entry)
        if seen is not None:
            with suppress(ImageNotFound):  # the folder may be another by now; its path tells
                return self._roots.read_in(*self._inside(path), path, seen)
        return self._roots.read(path, seen)

    def _inside(self, path: str) -> tuple[int, str]:
        """The open folder that holds a file, and the file's name; the last folder stays open."""
        folder, name = posixpath.split(path)
        if self._folder is None or self._folder[0] != folder:
            self._close_folder()
            with self._roots.opened(folder) as descriptor:
                self._folder = (folder, os.dup(descriptor))
        return self._folder[1], name

    def _close_folder(self) -> None:
        if self._folder is not None:
            os.close(self._folder[1])
        self._folder = None

    def _load_member(
        self, place: Place, offset: int, size: int, stored: int | None, name: str
    ) -> bytes:
        descriptor = self._archive(place)
        with storage_errors(Path(place.path or place.file or "")):
            if place.type == "zip":
                return read_member(descriptor, offset, stored or 0, size, shown(name))
            data = os.pread(descriptor, size, offset)
        if len(data) < size:
            raise ImageTruncated(f"the archive ends in the middle of {shown(name)}")
        return data

    def _load_cell(self, entry: Entry, place: Place, number: int) -> bytes:
        descriptor = self._archive(place)
        if self._rows is None or not self._rows.is_of(place, number):
            self._rows = TableRows(place, descriptor, number)
        try:
            cell = self._rows.cell(number)
        except (ImageSetUnreadable, ConfigurationError) as error:
            raise ImageUnreadable(error.message) from None
        image = image_in(cell, shown(entry.name))
        if isinstance(image, str):
            raise ImageUnreadable(f"the row of {shown(entry.name)} holds a path and no image")
        if len(image) > self._max_bytes:
            raise ImageTooLarge(
                f"{shown(entry.name)} has more than the {self._max_bytes:,} bytes this server accepts "
                "for an image"
            )
        return image

    def _archive(self, place: Place) -> int:
        """The open archive or table of a place, still as it was when it was listed."""
        descriptor = self._opened.pop(place, None)
        if descriptor is None:
            while len(self._opened) >= _MAX_OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            descriptor = self._open(place)
        self._opened[place] = descriptor  # the latest last
        if place.size is not None and place.mtime_ns is not None and place.file is None:
            Seen(place.size, place.mtime_ns).check(descriptor, place.path or "")
        return descriptor

    def _open(self, place: Place) -> int:
        if place.file is not None:
            path = self._open_upload(place.file)
            with storage_errors(path):
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with self._roots.opened(unescape_name(place.path or "")) as descriptor:
            return os.dup(descriptor)

    def _sidecar_bytes(self, entry: Entry, place: Place, kind: str) -> bytes | None:
        if place.type in {"tar", "zip"}:
            return self._sidecar_member(entry, place, kind)
        if place.type == "table" or (place.file is not None and entry.path is None):
            return None
        path = path_of(entry, place)
        if is_url(path):
            return None
        try:
            return self._texts.read(f"{posixpath.splitext(path)[0]}.{kind}", self._texts_seen)
        except ImageNotFound:
            return None
        except ImageTooLarge:
            raise _too_long(kind, entry.name) from None
        except ImageError as error:
            raise TextMissing(error.message, param="template") from None

    def _sidecar_member(self, entry: Entry, place: Place, kind: str) -> bytes | None:
        where = (entry.sidecars or {}).get(kind)
        if where is None:
            return None
        offset, size, *stored = where
        if max([size, *stored]) > MAX_SIDECAR_BYTES:
            raise _too_long(kind, entry.name)
        try:
            return self._load_member(place, offset, size, stored[0] if stored else None, entry.name)
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


def is_url(path: str) -> bool:
    """Whether a path is an address of an image server instead."""
    return path[:8].lower().startswith(("http://", "https://"))


def as_text(value: object) -> str | None:
    """A value of a table or of JSON as a prompt shows it; ``None`` stays so."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def texts_of(row: Mapping[str, object], columns: Sequence[str]) -> dict[str, str]:
    """The texts of a row for these columns; one that is too long is cut to what is still too long."""
    found = {column: as_text(row.get(column)) for column in columns}
    return {column: text[: MAX_TEXT + 1] for column, text in found.items() if text is not None}


def _seen(entry: Entry) -> Seen | None:
    if entry.size is None or entry.mtime_ns is None:
        return None
    return Seen(entry.size, entry.mtime_ns)


def _too_long(kind: str, name: str) -> TextMissing:
    return TextMissing(
        f"the .{kind} beside {shown(name)} has more than {MAX_SIDECAR_BYTES:,} bytes",
        param="template",
    )
