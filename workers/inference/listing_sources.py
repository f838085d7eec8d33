"""From what a caption job names to its entries: one place after the other, each by its kind."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator

import msgspec

from shared.captions import (
    CaptionSource,
    Entry,
    ImagePlace,
    Place,
    PlaceType,
    escape_name,
    unescape_name,
    unique_labels,
)
from shared.errors import ImageError, ImageSetUnreadable
from shared.tables import ARROW, ARROW_STREAM, PARQUET
from workers.inference.image_files import shown
from workers.inference.listing_archives import list_tar, list_zip, opened
from workers.inference.listing_base import Found, Surroundings, is_image_name, is_set_name
from workers.inference.listing_folders import found_file, is_pattern, list_folder, split_pattern
from workers.inference.listing_folders import walk as walk_folder
from workers.inference.listing_lists import list_lines
from workers.inference.listing_tables import list_rows
from workers.inference.tar_members import BLOCK, is_tar

_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")


def find_images(source: CaptionSource, after: object, around: Surroundings) -> Iterator[Found]:
    """The entries of all places in their order; ``after`` is a cursor of an earlier one.

    A place that cannot be read is an entry that says so, if there are others.
    Raises: ImageSetUnreadable if there is no other; StorageFailed.
    """
    labels = _labels(source.images)
    begun, inner = _pair(after, (0, None))
    first = int(str(begun))
    for index, asked in enumerate(source.images[first:], first):
        try:
            for found in _find(asked, labels[index], inner, around):
                yield found._replace(cursor=[index, found.cursor])
        except (ImageError, ImageSetUnreadable) as error:
            if len(source.images) == 1:
                raise ImageSetUnreadable(error.message, param="images") from None
            yield _unreadable(labels[index].removesuffix("/"), error, [index + 1, None])
        inner = None


def _unreadable(name: str, error: ImageError | ImageSetUnreadable, cursor: object) -> Found:
    """The entry that stands for a place that cannot be read."""
    return Found(Entry(name, refused=(ImageSetUnreadable.code, error.message)), _NOWHERE, cursor)


_NOWHERE = Place("image")
_BY_ITSELF = frozenset({None, "glob"})
"""Types that leave open what a file is."""


def _labels(places: list[ImagePlace]) -> list[str]:
    """What the names of each place's images begin with: nothing, if there is only one place."""
    if len(places) == 1:
        return [""]
    return [f"{label}/" for label in unique_labels([_label(place) for place in places])]


def _label(place: ImagePlace) -> str:
    path = place.path or place.file or ""
    if is_pattern(path):
        path = split_pattern(path)[0]
    return posixpath.basename(path.rstrip("/")) or "images"


def _find(asked: ImagePlace, label: str, after: object, around: Surroundings) -> Iterator[Found]:
    if asked.file is not None:
        place = Place("image", file=asked.file, prefix=label)
        return _find_in_file(asked, place, after, around)
    path = asked.path or ""
    if is_pattern(path) and (asked.type == "glob" or not posixpath.lexists(path)):
        return _find_by_pattern(asked, label, after, around)
    real = around.roots.resolve(path)
    is_folder = os.path.isdir(real)  # noqa: PTH112 - says no where Path.is_dir fails, for long names
    kind = None if asked.type == "glob" else asked.type
    if kind is not None and is_folder != (kind == "folder"):
        raise ImageSetUnreadable(f"{shown(path)} is {'a' if is_folder else 'no'} folder")
    if is_folder:
        place = Place("folder", path=escape_name(real), prefix=label)
        return list_folder(place, path, _text(after), around)
    return _find_in_file(asked, _file_place(real, label), after, around)


def _find_by_pattern(
    asked: ImagePlace, label: str, after: object, around: Surroundings
) -> Iterator[Found]:
    """Images that a pattern names, and those in archives and tables that it names.

    A cursor is the path of the last file, and where to go on in it if it is not done.
    """
    folder, pattern = split_pattern(asked.path or "")
    place = Place("folder", path=escape_name(around.roots.resolve(folder)), prefix=label)
    path, inner = _pair(after, ("", None))
    if inner is not None:
        yield from _find_within(asked, place, str(path), inner, around)
    for file in walk_folder(folder, str(path) or None, around, pattern):
        if file.refused is None and is_set_name(file.path):
            yield from _find_within(asked, place, escape_name(file.path), None, around)
        else:
            found = found_file(file, place)
            yield found._replace(cursor=[found.cursor, None])


def _find_within(
    asked: ImagePlace, folder: Place, name: str, after: object, around: Surroundings
) -> Iterator[Found]:
    """The images of one archive or table below a folder, their names below its own."""
    path = posixpath.join(unescape_name(folder.path or ""), unescape_name(name))
    prefix = f"{folder.prefix}{name}/"
    asked = msgspec.structs.replace(asked, type=None)
    try:
        real = around.roots.resolve(path)
        for found in _find_in_file(asked, _file_place(real, prefix), after, around):
            yield found._replace(cursor=[name, found.cursor])
    except (ImageError, ImageSetUnreadable) as error:
        yield _unreadable(prefix.removesuffix("/"), error, [name, None])


def _find_in_file(
    asked: ImagePlace, place: Place, after: object, around: Surroundings
) -> Iterator[Found]:
    """The images of a file, which may be one itself, by its content."""
    with opened(place, around) as stream:
        status = os.fstat(stream.fileno())
        kind = _kind(stream.read(BLOCK), place) if asked.type in _BY_ITSELF else asked.type
    place = msgspec.structs.replace(
        place,
        type=kind,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        image_column=asked.image_column,
    )
    if kind == "tar":
        return list_tar(place, after, around)
    if kind == "zip":
        return list_zip(place, after, around)
    if kind == "list":
        return list_lines(place, asked.name_column, after, around)
    if kind == "table":
        return list_rows(place, asked.name_column, after, around)
    if kind == "image":
        return iter([_single(place)] if after is None else [])
    raise ImageSetUnreadable(f"{shown(_name(place))} is a file, no {kind}")


def _kind(start: bytes, place: Place) -> PlaceType:
    """What a file is, by its first bytes. Raises: ImageSetUnreadable."""
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start.startswith((PARQUET, ARROW, ARROW_STREAM)):
        return "table"
    if start[257:262] == b"ustar" or is_tar(start):
        return "tar"
    if start.startswith(_PICTURES) or is_image_name(_name(place)):
        return "image"
    if start.startswith(_PACKED):
        raise ImageSetUnreadable(
            f"{shown(_name(place))} is compressed as a whole, so its images cannot be read by offset; "
            "unpack it to a plain .tar, or pack it as .zip"
        )
    if b"\0" in start:
        raise ImageSetUnreadable(
            f"{shown(_name(place))} is no folder, image, tar, zip, Parquet or Arrow file, and no list "
            "of paths"
        )
    return "list"


def _file_place(real: str, prefix: str) -> Place:
    return Place("image", path=escape_name(real), prefix=prefix)


def _single(place: Place) -> Found:
    name = _name(place)
    entry = Entry(
        (place.prefix.removesuffix("/") or name),
        path=place.path,
        size=place.size,
        mtime_ns=place.mtime_ns,
    )
    return Found(entry, place, 1)


def _name(place: Place) -> str:
    return place.file or posixpath.basename(place.path or "")


def _text(after: object) -> str | None:
    return None if after is None else str(after)


def _pair(after: object, start: tuple[object, object]) -> tuple[object, object]:
    """The two parts of a cursor, or where to start."""
    return (after[0], after[1]) if isinstance(after, list) else start
