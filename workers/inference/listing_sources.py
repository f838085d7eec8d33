"""From what a caption job names to its entries: one place after the other, each by its kind."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from shared.captions import (
    CaptionSource,
    Entry,
    ImagePlace,
    Place,
    PlaceType,
    escape_name,
    unique_labels,
)
from shared.errors import ImageError, ImageSetUnreadable, NotFound
from workers.inference.image_files import shown
from workers.inference.listing_base import Found, Surroundings, is_image_name
from workers.inference.listing_folders import is_pattern, list_folder, split_pattern


def find_images(
    source: CaptionSource, after: list[object] | None, around: Surroundings
) -> Iterator[Found]:
    """The entries of all places in their order; ``after`` is a cursor of an earlier one.

    A place that cannot be read is an entry that says so, if there are others.
    Raises: ImageSetUnreadable if there is no other; StorageFailed.
    """
    labels = _labels(source.images)
    first, inner = (0, None) if after is None else (int(str(after[0])), after[1])
    for index, asked in enumerate(source.images[first:], first):
        try:
            for found in _find(asked, labels[index], inner, around):
                yield found._replace(cursor=[index, found.cursor])
        except (ImageError, ImageSetUnreadable, NotFound) as error:
            if len(source.images) == 1:
                raise ImageSetUnreadable(error.message, param="images") from None
            name = labels[index].removesuffix("/")
            refused = (ImageSetUnreadable.code, error.message)
            yield Found(Entry(name, refused=refused), Place("image"), [index + 1, None])
        inner = None


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
    kind = asked.type or _kind(asked)
    assert asked.path is not None
    if kind == "folder":
        place = Place("folder", path=_real(asked.path, around), prefix=label)
        return list_folder(place, asked.path, _text(after), around)
    if kind == "glob":
        folder, pattern = split_pattern(asked.path)
        place = Place("folder", path=_real(folder, around), prefix=label)
        return list_folder(place, folder, _text(after), around, pattern)
    raise ImageSetUnreadable(f"{shown(asked.path)} is nothing that can be listed")


def _kind(asked: ImagePlace) -> PlaceType:
    path = asked.path or ""
    if is_pattern(path) and not posixpath.lexists(path):
        return "glob"
    if is_image_name(path):
        return "image"
    return "folder"


def _real(path: str, around: Surroundings) -> str:
    return escape_name(around.roots.resolve(path))


def _text(after: object) -> str | None:
    return None if after is None else str(after)
