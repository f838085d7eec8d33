"""By what the images of a synced set are known: where they lie, how a change shows, their bytes."""

from __future__ import annotations

import hashlib

from shared.caption_sets import Sighting
from shared.captions import Entry, Place
from shared.errors import ImageChanged
from workers.inference.entry_images import EntryImages, is_url, path_of
from workers.inference.image_files import shown


def content_digest(data: bytes) -> str:
    """What bytes are known by."""
    return hashlib.sha256(data).hexdigest()


def location_of(entry: Entry, place: Place) -> bytes | None:
    """Where an image lies, as a digest of 16 bytes; ``None`` if that may mean anything later."""
    if is_address(entry) or entry.refused is not None:
        return None
    if entry.path is not None or place.type == "folder":
        where = path_of(entry, place)
    else:
        where = f"{place.path or place.file}\0{place.image_column}\0{entry.offset}"
    return hashlib.blake2b(where.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def stat_of(entry: Entry, place: Place) -> tuple[int | None, int | None]:
    """By which size and time a change of an image would show: the file's or the archive's."""
    if entry.path is not None or place.type == "folder":
        return entry.size, entry.mtime_ns
    if place.file is not None:
        return entry.size or 0, 0  # an upload never changes
    return place.size, place.mtime_ns


def sighting_of(entry: Entry, place: Place, content: str, young: bool) -> Sighting:  # noqa: FBT001
    """What an index notes of an entry."""
    size, mtime_ns = stat_of(entry, place)
    return Sighting(size, None if young else mtime_ns, bytes.fromhex(content))


def holds(entry: Entry, data: bytes) -> bool:
    """Whether an image is still the one that was recognised."""
    return entry.content is None or is_address(entry) or content_digest(data) == entry.content


def load_as_listed(images: EntryImages, entry: Entry, place: Place) -> bytes:
    """The encoded image of an entry, if it is the one that was listed.

    Raises: ImageError, as ImageChanged if it is another; StorageFailed.
    """
    data = images.load(entry, place)
    if not holds(entry, data):
        raise ImageChanged(
            f"{shown(entry.name)} is not the image that it was when the set was listed; sync the "
            "set again"
        )
    return data


def is_address(entry: Entry) -> bool:
    """Whether the image is on an image server: its address is all that it is known by."""
    return entry.path is not None and is_url(entry.path)
