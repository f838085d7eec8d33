"""Recognising, while a synced set is listed, what has its caption already and what occurs twice.

A file whose size and time are as when its bytes were last read is taken to have the same bytes; all
others are read and hashed. What is known stays on disk, so memory does not grow with the set.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote

import msgspec

from shared.caption_sets import Asking, CaptionSet, Sighting, database_errors
from shared.captions import CaptionSource
from shared.errors import ImageError, ImageSetUnreadable, TextMissing
from shared.manifest import Manifest
from workers.inference.chunk_input import entry_lines, entry_of
from workers.inference.entry_identity import (
    content_digest,
    is_address,
    location_of,
    sighting_of,
    stat_of,
)
from workers.inference.entry_images import EntryImages, path_of
from workers.inference.listing_base import Found

_GROUP = 256
_READERS = 8
"""Files that are read at once; most of the time a network disk lets them wait."""
_YOUNG_NS = 2_000_000_000
"""A file that was written so shortly before may be written again without a later time."""


class Recognizer:
    """Recognises the entries of one listing; a context manager.

    ``images`` reads them. ``only_new``: those that have their captions under their names are passed.
    ``scratch`` is a folder that goes when the listing ends.
    Raises: StorageFull, StorageFailed.
    """

    def __init__(
        self,
        source: CaptionSource,
        asking: Asking,
        known: CaptionSet,
        images: EntryImages,
        scratch: Path,
        *,
        only_new: bool,
    ) -> None:
        assert source.sync is not None, "the set is not synced"
        self._rehash = source.sync.rehash
        self._only_new = only_new
        self._columns = source.columns
        self._asking = asking
        self._known = known
        self._images = images
        self._firsts = FirstLines(scratch / "firsts.sqlite")
        self._readers = ThreadPoolExecutor(_READERS, "hash")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._firsts.close()

    def remember(self, manifest: Manifest, keep_going: Callable[[], None]) -> None:
        """Learn of the entries that were listed before, by whoever did."""
        for chunk in manifest.chunks():
            keep_going()
            for line in entry_lines(manifest, chunk):
                entry = entry_of(line)
                if entry.content is not None and not entry.known and entry.same_as is None:
                    self._firsts.add(self._asking.key(entry.content, entry.texts), line.number)

    def recognise(self, found: Iterator[Found], number: int) -> Iterator[Found]:
        """The same entries with what is known of each; the first one's line will be ``number``.

        Those that need no line come with ``passed`` set.
        Raises: what ``found`` raises, once all before it was given.
        """
        for group in _groups(found):
            for one in self._recognised(group):
                if self._is_passed(one):
                    yield one.found._replace(passed=True)
                    continue
                yield self._numbered(one, number)
                number += 1

    def _recognised(self, group: list[Found]) -> list[_Recognised]:
        clean = [_unmarked(item) for item in group]
        at = [location_of(item.entry, item.place) for item in clean]
        seen = self._known.sightings(location for location in at if location is not None)
        before = [None if location is None else seen.get(location) for location in at]
        contents = self._contents(clean, before)
        now_ns = time.time_ns()
        rows = [self._marked(*row, now_ns) for row in zip(clean, contents, before, strict=True)]
        captioned = self._known.known(row.key for row in rows if row.key is not None)
        return [row._replace(known=row.key in captioned) for row in rows]

    def _contents(self, group: list[Found], before: list[Sighting | None]) -> list[str | None]:
        """The digests of the images' bytes, those that have to be read together."""
        contents: list[str | None] = [None] * len(group)
        files = []
        for index, (item, seen) in enumerate(zip(group, before, strict=True)):
            if seen is not None and not self._rehash and _is_as_seen(item, seen):
                contents[index] = seen.content.hex()
            elif _is_file(item):
                files.append(index)
            elif item.entry.refused is None:
                contents[index] = self._digest(item)
        # A share for each reader: handing over every file on its own costs more than reading it.
        shares = [files[start::_READERS] for start in range(min(_READERS, len(files)))]
        digests = self._readers.map(
            lambda share: [self._digest(group[index]) for index in share], shares
        )
        for share, found in zip(shares, digests, strict=True):
            for index, digest in zip(share, found, strict=True):
                contents[index] = digest
        return contents

    def _digest(self, item: Found) -> str | None:
        """``None`` for what cannot be read; whoever does it next says why."""
        entry, place = item.entry, item.place
        if is_address(entry):
            # Not fetched to be compared: an address stands for the same image for ever.
            return content_digest(path_of(entry, place).encode())
        try:
            return content_digest(self._images.load(entry, place))
        except ImageError:
            return None

    def _marked(
        self, item: Found, content: str | None, before: Sighting | None, now_ns: int
    ) -> _Recognised:
        if content is None:
            return _Recognised(item, None)
        entry = item.entry
        try:
            texts = entry.texts
            if self._columns:
                # Kept with the entry, so that what is asked is what the caption is known by.
                texts = self._images.texts(entry, item.place, self._columns)
            key = self._asking.key(content, texts)
        except TextMissing:
            return _Recognised(item, None)
        _, mtime_ns = stat_of(entry, item.place)
        young = mtime_ns is not None and now_ns - mtime_ns < _YOUNG_NS
        noted = before is not None and before == sighting_of(entry, item.place, content, young)
        stays = before is not None and before.content.hex() == content
        entry = msgspec.structs.replace(
            entry, content=content, texts=texts, young=young, noted=noted
        )
        return _Recognised(item._replace(entry=entry), key, stays=stays)

    def _is_passed(self, one: _Recognised) -> bool:
        return self._only_new and one.known and one.stays

    def _numbered(self, one: _Recognised, number: int) -> Found:
        if one.key is None:
            return one.found
        entry = one.found.entry
        if one.known:
            entry = msgspec.structs.replace(entry, known=True)
        else:
            first = self._firsts.add(one.key, number)
            if first != number:
                entry = msgspec.structs.replace(entry, same_as=first)
        return one.found._replace(entry=entry)


class _Recognised(NamedTuple):
    """``key`` is what the caption is known by; ``stays`` says that these bytes were here before."""

    found: Found
    key: bytes | None
    known: bool = False
    stays: bool = False


class FirstLines:
    """The first line of each key, on disk. Raises: StorageFull, StorageFailed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with database_errors(path):
            # Nobody else opens it, and it need not survive.
            name = f"file:{quote(str(path))}?nolock=1"
            self._base = sqlite3.connect(name, uri=True, isolation_level=None)
            self._base.execute("pragma journal_mode = off")
            self._base.execute("pragma synchronous = off")
            self._base.execute("create table firsts (key blob primary key, line int) without rowid")
            self._base.execute("begin")

    def add(self, key: bytes, line: int) -> int:
        """The first line of this key, which is this one if there was none."""
        with database_errors(self._path):
            added = self._base.execute("insert or ignore into firsts values (?, ?)", (key, line))
            if added.rowcount:
                return line
            row = self._base.execute("select line from firsts where key = ?", (key,)).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Close the file."""
        self._base.close()


def _unmarked(item: Found) -> Found:
    """The entry without what the batch made of it that this one retries."""
    if item.entry.content is None:
        return item
    entry = msgspec.structs.replace(
        item.entry, content=None, known=False, same_as=None, noted=False, young=False
    )
    return item._replace(entry=entry)


def _is_as_seen(item: Found, seen: Sighting) -> bool:
    size, mtime_ns = stat_of(item.entry, item.place)
    return mtime_ns is not None and (size, mtime_ns) == (seen.size, seen.mtime_ns)


def _is_file(item: Found) -> bool:
    """Whether it is read on its own; archives are read one member after the other."""
    entry = item.entry
    is_file = entry.path is not None or item.place.type == "folder"
    return is_file and entry.refused is None and not is_address(entry)


def _groups(found: Iterator[Found]) -> Iterator[list[Found]]:
    group: list[Found] = []
    broken: ImageSetUnreadable | None = None
    try:
        for item in found:
            group.append(item)
            if len(group) == _GROUP:
                yield group
                group = []
    except ImageSetUnreadable as error:
        broken = error
    if group:
        yield group
    if broken is not None:
        raise broken
