"""A batch's manifest: where each chunk lies in the input file, on shared storage.

``chunks.bin`` holds one fixed-size record per chunk, so that a consumer reads only the one it
needs and memory does not grow with the batch; ``duplicates.bin`` holds the numbers of the lines
whose custom_id an earlier line used, sorted; ``plan.json``, written last, makes the plan whole.

The manifest of an image set grows instead: see :mod:`shared.listing`. Reading is the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.captions import SyncPlan
from shared.errors import StorageFailed
from shared.jobs import BatchProblem
from shared.storage import atomic_file, read_json, storage_errors, sync_folder, write_json

_RECORD = struct.Struct("<QQQI")
_LINE = struct.Struct("<Q")
_BUFFER = 1 << 16
_FOLDER = "manifest"
_LISTED = re.compile(r"(\d{10})\.plan\.json")
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)

PartKind = Literal["plan.json", "chunks.bin", "entries.jsonl", "places.jsonl"]

TOO_LONG = 0
"""The length of a chunk that is one line longer than lines may be; nobody reads it."""


class Chunk(msgspec.Struct, frozen=True):
    """Some consecutive lines of the input: ``length`` bytes at ``offset``.

    ``first_line`` counts physical lines from 1; ``items`` counts the lines that are not blank.
    """

    index: int
    offset: int
    length: int
    first_line: int
    items: int


CHUNK_BYTES = _RECORD.size
"""What one chunk takes in a table of chunks."""


def pack_chunk(chunk: Chunk) -> bytes:
    """A chunk as a table of chunks has it."""
    return _RECORD.pack(chunk.offset, chunk.length, chunk.first_line, chunk.items)


class Part(msgspec.Struct, frozen=True):
    """The chunks from ``first_chunk`` on are of the listing under this token."""

    token: int
    first_chunk: int


class Plan(msgspec.Struct, frozen=True):
    """What planning found, or has found so far.

    Only the plan of an image set has the rest: ``parts`` say whose entries are whose, the last one's
    token is that of the plan's own files. ``cursor`` is where its listing goes on. Of a sample,
    ``seen`` is how many images it was taken from, ``seen_all`` whether the set has no more. ``sync`` is
    that of a set that is synced.
    """

    model: str
    chunks: int
    total: int
    complete: bool = True
    parts: list[Part] = []
    cursor: Any = None
    problems: list[BatchProblem] = []
    seen: int | None = None
    seen_all: bool = True
    sync: SyncPlan | None = None


class ManifestWriter:
    """Writes a manifest in ``scratch``; ``finish`` moves it into ``folder``, where it stays.

    Raises: StorageFull, StorageFailed.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._target = folder / _FOLDER
        self._folder = scratch / _FOLDER
        with storage_errors(self._folder):
            self._folder.mkdir(mode=0o700)

    def write_chunks(self, chunks: Iterable[Chunk]) -> int:
        """Write the chunk records as they come; returns how many."""
        count = 0
        with atomic_file(self._folder / "chunks.bin") as stream:
            for chunk in chunks:
                stream.write(pack_chunk(chunk))
                count += 1
        return count

    def write_duplicates(self, lines: Iterable[int]) -> None:
        """Write the sorted numbers of lines with a custom_id used before."""
        with atomic_file(self._folder / "duplicates.bin") as stream:
            for line in lines:
                stream.write(_LINE.pack(line))

    def finish(self, plan: Plan) -> Plan:
        """Make the plan whole; returns the one that counts, which is the first of several."""
        write_json(self._folder / "plan.json", plan)
        with storage_errors(self._target):
            try:
                os.rename(self._folder, self._target)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                return Manifest(self._target.parent).plan
            sync_folder(self._target.parent)
        return plan


def part_path(folder: Path, token: int, kind: PartKind) -> Path:
    """A file of the listing under ``token`` of the image set of the batch in ``folder``."""
    return folder / _FOLDER / f"{token:010d}.{kind}"


def latest_listing(folder: Path) -> int | None:
    """The highest token under which the image set was listed, if it was."""
    if not (folder / _FOLDER).exists():
        return None
    with os.scandir(folder / _FOLDER) as entries:
        found = [match for entry in entries if (match := _LISTED.fullmatch(entry.name))]
    return max((int(match[1]) for match in found), default=None)


class Manifest:
    """Reads a manifest. Raises StorageFailed where it is damaged.

    That of an image set may grow; what is read is as it was when this was made.
    """

    def __init__(self, folder: Path) -> None:
        self._batch = folder
        self._folder = folder / _FOLDER
        self._chunks = self._folder / "chunks.bin"
        path = self._folder / "plan.json"
        plan = read_json(path)
        if plan is None:
            with storage_errors(self._folder):
                token = latest_listing(folder)
            if token is None:
                raise StorageFailed(f"{folder}: the manifest is missing")
            self._chunks = part_path(folder, token, "chunks.bin")
            plan = read_json(part_path(folder, token, "plan.json"))
            if plan is None:
                raise StorageFailed(f"{folder}: the manifest is being replaced; try again")
        self.plan = msgspec.convert(plan, Plan)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether planning was finished, or has begun to tell chunks of an image set."""
        if (folder / _FOLDER / "plan.json").exists():
            return True
        with storage_errors(folder):
            return latest_listing(folder) is not None

    def part(self, index: int) -> int:
        """The token of the listing whose files hold the entries of the chunk ``index``."""
        at = bisect_right(self.plan.parts, index, key=lambda part: part.first_chunk)
        return self.plan.parts[at - 1].token

    def entries(self, index: int) -> Path:
        """The file that holds the entries of the chunk ``index`` of an image set."""
        return part_path(self._batch, self.part(index), "entries.jsonl")

    def places(self, index: int) -> Path:
        """The file that holds the places of the entries of the chunk ``index``."""
        return part_path(self._batch, self.part(index), "places.jsonl")

    def chunk(self, index: int) -> Chunk:
        """The chunk number ``index``, from 0."""
        with storage_errors(self._folder), open(self._chunks, "rb") as stream:
            record = os.pread(stream.fileno(), _RECORD.size, index * _RECORD.size)
        if len(record) != _RECORD.size:
            raise StorageFailed(f"{self._folder}: the manifest has no chunk {index}")
        return Chunk(index, *_RECORD.unpack(record))

    def chunk_of_line(self, line: int) -> int:
        """The index of the last chunk that begins at or before that line, or else 0."""
        key = lambda index: self.chunk(index).first_line  # noqa: E731 - only bisect needs it
        return max(0, bisect_right(range(self.plan.chunks), line, key=key) - 1)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks of the plan in order, a buffer at a time."""
        with storage_errors(self._folder), open(self._chunks, "rb") as stream:
            index = 0
            while block := stream.read(_RECORD.size * (_BUFFER // _RECORD.size)):
                for record in _RECORD.iter_unpack(block):
                    if index == self.plan.chunks:
                        return  # a listing that goes on has written more since
                    yield Chunk(index, *record)
                    index += 1

    def duplicates(self, first_line: int, last_line: int) -> frozenset[int]:
        """The duplicate lines between two line numbers, both included."""
        path = self._folder / "duplicates.bin"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return frozenset()
        if size == 0:
            return frozenset()
        with (
            storage_errors(path),
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as data,
            memoryview(data) as raw,
            raw.cast("Q") as lines,
        ):
            start = bisect_left(lines, first_line)
            stop = bisect_left(lines, last_line + 1)
            return frozenset(lines[start:stop].tolist())
