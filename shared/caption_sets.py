"""What is known of image sets that are synced: which bytes lie where, and the captions of bytes.

A set's folder holds segments, each a database that appears whole and is never written again:
``FIRST-LAST.sqlite`` has what the generations FIRST to LAST learned, and takes the place of whatever
covers fewer of them. Nothing has to be locked, which some network file systems cannot do; whoever
writes a generation again writes the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import msgspec

from shared.captions import CaptionSource, Template, parameters_of
from shared.errors import StorageFailed, StorageFull
from shared.models import ModelRecord
from shared.quality import Verdict
from shared.storage import TEMPORARY_SUFFIX, Layout, storage_errors, sync_folder

_NAME = re.compile(r"(\d{8})-(\d{8})\.sqlite")
_HALF = re.compile(r"\.(\d+)\.[0-9a-f]{8}\.part")
_ASK_AT_ONCE = 500
_MERGE_BELOW = 2
"""Older segments with fewer than so many times the rows are merged into the newer one."""

_DAMAGED = (
    "; if what is known of this image set is damaged, move that folder away, and the images are "
    "captioned anew"
)

_SCHEMA = """
create table sightings (location blob, size int, mtime_ns int, content blob);
create table captions (key blob, caption blob);
"""
_APPEND_OLD = """
insert into sightings select * from old.sightings order by rowid;
insert into captions select * from old.captions order by rowid;
"""
# Made last: sorting once is much faster than keeping a tree in order, and needs no memory.
_INDEXES = """
create index by_location on sightings (location);
create index by_key on captions (key);
"""


class Sighting(NamedTuple):
    """A file as it was: its size in bytes, when it was written, the SHA-256 of its bytes.

    ``mtime_ns`` is ``None`` if it cannot tell a later change.
    """

    size: int | None
    mtime_ns: int | None
    content: bytes


class Caption(msgspec.Struct, frozen=True):
    """An answer that was paid for, and the batch that did; the quality gate's verdict if it had one."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    created: int
    batch_id: str
    verdict: Verdict | None = None


def set_id(owner: str, source: CaptionSource) -> str:
    """The name of a synced set's folder: the owner's, by its name or else by its places."""
    assert source.sync is not None, "the set is not synced"
    places = None if source.sync.name is not None else msgspec.to_builtins(source.images)
    identity = msgspec.json.encode([owner, source.sync.name, places])
    return hashlib.sha256(identity).hexdigest()[:32]


def model_identity(model: ModelRecord) -> str:
    """What changes whenever a model is linked anew or reloaded."""
    return f"{model.name} {model.revision} {model.created}"


class Asking:
    """What is asked about the images of a set, as a part of what a caption is known by."""

    def __init__(self, source: CaptionSource, model: str) -> None:
        self._asked: Template = source.asked
        said: list[Any] = [model, source.system, source.detail, parameters_of(source)]
        if source.quality is not None:
            said.append(source.quality)
        self._digest = hashlib.sha256(msgspec.json.encode(said))

    def key(self, content: str, texts: Mapping[str, str] | None) -> bytes:
        """What the caption of these bytes is known by. Raises: TextMissing."""
        digest = self._digest.copy()
        digest.update(bytes.fromhex(content))
        digest.update(self._asked.fill(texts or {}).encode())
        return digest.digest()


def mark_used(folder: Path) -> None:
    """Note that a set was synced now. Raises: StorageFailed."""
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(folder)


def sets_unused_since(layout: Layout, unix_s: int) -> list[Path]:
    """The folders of sets that were last synced before that. Raises: StorageFailed."""
    with storage_errors(layout.captions):
        folders = [path for path in layout.captions.iterdir() if not path.name.startswith(".")]
        return sorted(path for path in folders if path.stat().st_mtime < unix_s)


class Segment(NamedTuple):
    """What some generations learned."""

    first: int
    last: int
    path: Path


def segments(folder: Path) -> list[Segment]:
    """The segments that count, oldest first. Raises: StorageFailed."""
    found: list[Segment] = []
    with storage_errors(folder):
        paths = list(folder.iterdir()) if folder.exists() else []
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match:
            found.append(Segment(int(match[1]), int(match[2]), path))
    found.sort(key=lambda segment: (segment.first, -segment.last))
    counting: list[Segment] = []
    for segment in found:
        if not counting or segment.last > counting[-1].last:
            counting.append(segment)
    return counting


class CaptionSet:
    """Reads a set's folder, as it was when this was made; a context manager.

    Raises: StorageFailed, also where a segment is damaged.
    """

    def __init__(self, folder: Path) -> None:
        present = segments(folder)
        self.generation = present[-1].last if present else 0
        """The last one that is there."""
        self._folder = folder
        self._bases: list[sqlite3.Connection] = []
        with database_errors(folder, _DAMAGED):
            for segment in reversed(present):
                self._bases.append(sqlite3.connect(_immutable(segment.path), uri=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for base in self._bases:
            base.close()

    def sightings(self, locations: Iterable[bytes]) -> dict[bytes, Sighting]:
        """What was seen at these locations, if anything was."""
        select = "select location, size, mtime_ns, content from sightings where location"
        rows = self._newest(select, locations)
        return {location: Sighting(*values) for location, *values in rows}

    def known(self, keys: Iterable[bytes]) -> set[bytes]:
        """Which of the keys have captions."""
        return {key for (key,) in self._newest("select key from captions where key", keys)}

    def captions(self, keys: Iterable[bytes]) -> dict[bytes, Caption]:
        """The captions of these keys, as far as there are any."""
        rows = self._newest("select key, caption from captions where key", keys)
        return {key: msgspec.msgpack.decode(caption, type=Caption) for key, caption in rows}

    def _newest(self, select: str, wanted: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
        """The newest row for each first column among ``wanted``."""
        left = set(wanted)
        for base in self._bases:
            for some in _in_parts(sorted(left)):
                marks = ",".join("?" * len(some))
                with database_errors(self._folder, _DAMAGED):
                    rows = base.execute(f"{select} in ({marks}) order by rowid", some).fetchall()
                for row in rows:
                    if row[0] in left:
                        left.remove(row[0])
                        yield row
            if not left:
                return


class SegmentWriter:
    """Collects what a generation learned. Raises: StorageFull, StorageFailed."""

    def __init__(self, base: sqlite3.Connection, path: Path) -> None:
        self._base = base
        self._path = path
        self.rows = 0

    def add_sighting(self, location: bytes, seen: Sighting) -> None:
        """Note what lies at a location."""
        self._insert("insert into sightings values (?, ?, ?, ?)", (location, *seen))

    def add_caption(self, key: bytes, caption: Caption) -> None:
        """Note a caption."""
        encoded = msgspec.msgpack.encode(caption)
        self._insert("insert into captions values (?, ?)", (key, encoded))

    def _insert(self, statement: str, values: tuple[Any, ...]) -> None:
        with database_errors(self._path):
            self._base.execute(statement, values)
        self.rows += 1


def add_generation(
    folder: Path, generation: int, fill: Callable[[SegmentWriter], None]
) -> int | None:
    """Add to the set in ``folder`` what ``fill`` writes; returns its rows.

    Does nothing if that generation is there: ``None``. Older segments that have not many more rows are merged
    into the new one, so there are never more than some twenty. Raises: StorageFull, StorageFailed.
    """
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    present = segments(folder)
    if present and present[-1].last >= generation:
        return None
    path = folder / f".{generation}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        with _new_segment(path) as base:
            writer = SegmentWriter(base, path)
            base.execute("begin")
            fill(writer)
            base.execute("commit")
            first = _merge(base, present, writer.rows, generation)
            base.executescript(_INDEXES)
        if writer.rows:
            _publish(path, folder / f"{first:08d}-{generation:08d}.sqlite")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
    _tidy(folder)
    return writer.rows


def _merge(base: sqlite3.Connection, present: list[Segment], rows: int, generation: int) -> int:
    """Append older segments, newest first; returns the first generation that the new one covers."""
    first = generation
    for segment in reversed(present):
        base.execute("attach ? as old", (_immutable(segment.path),))
        counts = "select coalesce(max(rowid), 0) from old.sightings union all "
        counts += "select coalesce(max(rowid), 0) from old.captions"
        older = sum(count for (count,) in base.execute(counts).fetchall())
        merged = rows > 0 and older < _MERGE_BELOW * rows
        if merged:
            base.executescript(_APPEND_OLD)
            rows, first = rows + older, segment.first
        base.execute("detach old")
        if not merged:
            break
    return first


def _publish(path: Path, target: Path) -> None:
    with storage_errors(target):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(path, target)
        sync_folder(target.parent)


def _tidy(folder: Path) -> None:
    """Delete segments that others cover, and what a killed finalizer left of generations by now there.

    Nobody of this set's one sync needs them.
    """
    counting = segments(folder)
    latest = counting[-1].last if counting else 0
    paths = {segment.path for segment in counting}
    with storage_errors(folder):
        for path in folder.iterdir():
            half = _HALF.fullmatch(path.name)
            covered = _NAME.fullmatch(path.name) and path not in paths
            if covered or (half and int(half[1]) <= latest):
                path.unlink(missing_ok=True)


@contextmanager
def _new_segment(path: Path) -> Iterator[sqlite3.Connection]:
    with database_errors(path):
        base = sqlite3.connect(f"file:{quote(str(path))}?nolock=1", uri=True, isolation_level=None)
        try:
            os.chmod(path, 0o600)
            base.execute("pragma journal_mode = off")
            base.execute("pragma synchronous = off")  # it counts only once it is renamed
            base.executescript(_SCHEMA)
            yield base
        finally:
            base.close()


@contextmanager
def database_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turn what SQLite raises below into StorageFull or StorageFailed."""
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFull(f"no space left for {path.name}; {StorageFull.__doc__}") from error
        raise StorageFailed(f"{path}: {error}{advice}") from error


def _immutable(path: Path) -> str:
    return f"file:{quote(str(path))}?immutable=1"


def _in_parts(items: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(items), _ASK_AT_ONCE):
        yield items[start : start + _ASK_AT_ONCE]
