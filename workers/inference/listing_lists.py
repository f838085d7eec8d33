"""The images that a list file names: a path or URL per line, or a JSON object per line.

Paths may be absolute, or relative to the folder of the list. They are read, like all others, only below
the image roots. Texts that a template needs come from the objects, or lie beside the images.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from shared.captions import Entry, Place, escape_name, unescape_name
from shared.errors import EntryRefused
from workers.inference.entry_images import as_text, is_url, texts_of
from workers.inference.image_files import shown
from workers.inference.listing_archives import opened
from workers.inference.listing_base import Found, Surroundings

IMAGE_COLUMNS = ("image", "file_name", "path", "image_path", "url")
"""What the column of images is usually called, when nobody says."""
MAX_LINE_BYTES = 1 << 20
_TICK_EVERY = 1024
_object = msgspec.json.Decoder(dict[str, object])


def list_lines(
    place: Place, name_column: str | None, after: object, around: Surroundings
) -> Iterator[Found]:
    """The images that the lines name, in their order. A cursor is the next line's place and number."""
    at, number = (0, 0) if after is None else _pair(after)
    with opened(place, around) as stream:
        stream.seek(at)
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            at += len(line)
            if number % _TICK_EVERY == 0:
                around.keep_going()
            is_long = len(line) > MAX_LINE_BYTES
            if is_long:
                at += _skip_line(stream)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip(b"\r\n")
            if line.strip():
                entry = _refused(place, number, "is too long") if is_long else None
                entry = entry or _entry(line, number, place, name_column, around)
                yield Found(entry, place, [at, number])


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while rest := stream.readline(MAX_LINE_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _entry(
    line: bytes, number: int, place: Place, name_column: str | None, around: Surroundings
) -> Entry:
    if not line.lstrip().startswith(b"{"):
        path = line.decode("utf-8", "surrogateescape")
        return path_entry(path, escape_name(path), place, {})
    try:
        row = _object.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _refused(place, number, f"is no JSON object: {error}")
    column = place.image_column or next((name for name in IMAGE_COLUMNS if name in row), "")
    value = as_text(row.get(column))
    if not value:
        return _refused(place, number, f"has no image in {column or ' or '.join(IMAGE_COLUMNS)}")
    name = as_text(row.get(name_column)) if name_column else value
    return path_entry(value, escape_name(name or value), place, texts_of(row, around.columns))


def path_entry(path: str, name: str, place: Place, texts: dict[str, str]) -> Entry:
    """The entry of an image that is named by its path or URL. Relative paths are beside the list."""
    if not is_url(path) and not path.startswith("/"):
        if place.path is None:
            refused = EntryRefused(
                f"the path {shown(path)} is relative, which an upload cannot hold"
            )
            return Entry(place.prefix + name, refused=(refused.code, refused.message))
        path = posixpath.join(posixpath.dirname(unescape_name(place.path)), path)
    return Entry(place.prefix + name, path=escape_name(path), texts=texts or None)


def _refused(place: Place, number: int, why: str) -> Entry:
    message = f"line {number} of the list {why}"
    return Entry(f"{place.prefix}line {number}", refused=(EntryRefused.code, message))


def _pair(after: object) -> tuple[int, int]:
    assert isinstance(after, list), "no cursor of a list"
    return int(after[0]), int(after[1])
