"""Planning a batch: count its lines, cut them into chunks, find custom_ids used twice.

Reads the input file once (twice when something repeats) with memory that does not grow with it:
custom_ids are hashed into files by their lowest bits, and each of those is small enough for a set.
Whether a line can be run is found out later, by the consumer that runs it.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared.errors import (
    DuplicateCustomId,
    EmptyFile,
    InvalidJson,
    ModelNotFound,
)
from shared.jobs import BatchProblem
from shared.manifest import TOO_LONG, Chunk, Manifest, ManifestWriter, Plan
from shared.settings import QueueSettings
from shared.storage import storage_errors
from workers.inference.batch_lines import BOM, MAX_CUSTOM_ID, UNREADABLE

_BUCKETS = 64
_SPILL_EVERY = 65_536
_TICK_EVERY = 8_192
_MAX_REPEATED_IDS = 100_000
_READ_BYTES = 1 << 20


class _Head(msgspec.Struct):
    custom_id: str


class _BodyHead(msgspec.Struct):
    model: str


class _ModelHead(msgspec.Struct):
    body: _BodyHead


_head = msgspec.json.Decoder(_Head)
_model_head = msgspec.json.Decoder(_ModelHead)


class Rejected(Exception):
    """Nothing of the input can be run."""

    def __init__(self, total: int, problem: BatchProblem) -> None:
        self.total = total
        self.problem = problem
        super().__init__(problem.message)


class Line(msgspec.Struct, frozen=True):
    """One line that is not blank; ``text`` is empty if it is longer than allowed."""

    number: int
    offset: int
    length: int
    text: bytes


def plan_batch(
    source: Path,
    folder: Path,
    settings: QueueSettings,
    *,
    knows_model: Callable[[str], bool],
    keep_going: Callable[[], None],
) -> Plan:
    """Write the manifest of the JSONL file ``source`` below ``folder``.

    A batch is cut once: if another planner was faster, its plan is the one that counts.
    ``keep_going`` is called every few thousand lines and may raise to stop.
    Raises: Rejected, StorageFull, StorageFailed.
    """
    if Manifest.exists(folder):
        return Manifest(folder).plan
    with storage_errors(folder):
        for stale in folder.glob("planning-*"):
            shutil.rmtree(stale, ignore_errors=True)  # what a killed planner left
        scratch = Path(tempfile.mkdtemp(prefix="planning-", dir=folder))
    try:
        survey = _Survey(scratch, knows_model)
        writer = ManifestWriter(folder, scratch)
        with storage_errors(source), open(source, "rb", buffering=_READ_BYTES) as stream:
            lines = survey.watch(read_lines(stream, settings.max_line_bytes), keep_going)
            chunks = writer.write_chunks(cut(lines, settings, source.stat().st_size))
            model = survey.require_model()
            repeated = survey.repeated_hashes()
            if repeated:
                keep_going()
                stream.seek(0)
                again = read_lines(stream, settings.max_line_bytes)
                writer.write_duplicates(_duplicate_lines(again, repeated, keep_going))
        return writer.finish(Plan(model=model, chunks=chunks, total=survey.total))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_lines(stream: BinaryIO, max_line_bytes: int) -> Iterator[Line]:
    """The lines of a JSONL file that are not blank; over-long ones are passed over unread."""
    number, offset = 0, 0
    while text := stream.readline(max_line_bytes + 1):
        number += 1
        length = len(text)
        if number == 1:
            text = text.removeprefix(BOM)
        if length > max_line_bytes and not text.endswith(b"\n"):
            length += _skip_line(stream)
            yield Line(number, offset, length, b"")
        elif text and not text.isspace():
            yield Line(number, offset, length, text)
        offset += length


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while rest := stream.readline(_READ_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def cut(lines: Iterator[Line], settings: QueueSettings, size_bytes: int) -> Iterator[Chunk]:
    """Group consecutive lines; an over-long line is a chunk of its own.

    ``size_bytes`` is the whole file's. From it and the lines read so far follows about how many
    there are, and so how many belong in a chunk if all workers are to have some.
    """
    index, items, seen = 0, 0, 0
    most = min(settings.min_chunk_items, settings.chunk_items)
    first = last = Line(0, 0, 0, b"")
    for line in lines:
        size = line.offset + line.length - first.offset
        full = items >= most or size > settings.chunk_bytes
        if items and (full or not line.text or not last.text):
            yield _chunk(index, first, last, items)
            seen += items
            most = _fair(seen, line.offset, size_bytes, settings)
            index, items = index + 1, 0
        if items == 0:
            first = line
        last = line
        items += 1
    if items:
        yield _chunk(index, first, last, items)


def _fair(seen: int, offset: int, size_bytes: int, settings: QueueSettings) -> int:
    """How many lines the next chunk should have, ``seen`` of them being before ``offset``."""
    expected = seen * size_bytes / max(1, offset)
    fair = round(expected / settings.spread_chunks)
    return min(settings.chunk_items, max(settings.min_chunk_items, fair))


def _chunk(index: int, first: Line, last: Line, items: int) -> Chunk:
    length = last.offset + last.length - first.offset if first.text else TOO_LONG
    return Chunk(index, first.offset, length, first.number, items)


class _Survey:
    """What is learned of the lines as they stream by."""

    def __init__(self, scratch: Path, knows_model: Callable[[str], bool]) -> None:
        self.total = 0
        self._scratch = scratch
        self._knows_model = knows_model
        self._model: str | None = None
        self._named_model: str | None = None
        self._named_line = 0
        self._first_line = 0
        self._readable = 0
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._spilled = False

    def watch(self, lines: Iterator[Line], keep_going: Callable[[], None]) -> Iterator[Line]:
        """Pass ``lines`` on while noting their custom_ids and the first known model."""
        buckets = self._buckets
        for line in lines:
            self.total += 1
            self._first_line = self._first_line or line.number
            if self.total % _TICK_EVERY == 0:
                keep_going()
            if self._model is None:
                self._look_for_model(line)
            try:
                digest = hash(_head.decode(line.text).custom_id)
            except UNREADABLE:
                digest = None  # the consumer reports this line
            if digest is not None:
                self._readable += 1
                buckets[digest & (_BUCKETS - 1)].append(digest)
                if self._readable % _SPILL_EVERY == 0:
                    self._spill()
            yield line

    def require_model(self) -> str:
        """The batch's model: the first that is linked. Raises: Rejected."""
        if self.total == 0:
            raise Rejected(0, BatchProblem(EmptyFile.code, EmptyFile.__doc__ or ""))
        if self._model is not None:
            return self._model
        if self._named_model is not None:
            message = f"there is no model '{self._named_model}'; GET /v1/models lists those linked"
            problem = BatchProblem(ModelNotFound.code, message, "model", self._named_line)
            raise Rejected(self.total, problem)
        message = "no line is a JSON object with custom_id, method, url and a body naming a model"
        raise Rejected(self.total, BatchProblem(InvalidJson.code, message, line=self._first_line))

    def repeated_hashes(self) -> frozenset[int]:
        """The hashes that more than one custom_id has. Raises: Rejected if there are too many."""
        repeated: set[int] = set()
        for index in range(_BUCKETS):
            repeated.update(_repeated(self._bucket(index)))
            if len(repeated) > _MAX_REPEATED_IDS:
                message = f"more than {_MAX_REPEATED_IDS} custom_ids are used twice"
                raise Rejected(self.total, BatchProblem(DuplicateCustomId.code, message))
        return frozenset(repeated)

    def _look_for_model(self, line: Line) -> None:
        try:
            named = _model_head.decode(line.text).body.model
        except UNREADABLE:
            return  # the consumer reports this line
        if self._named_model is None:
            self._named_model, self._named_line = named, line.number
        if self._knows_model(named):
            self._model = named

    def _spill(self) -> None:
        self._spilled = True
        for index, bucket in enumerate(self._buckets):
            with storage_errors(self._scratch), open(self._scratch / str(index), "ab") as stream:
                bucket.tofile(stream)
            del bucket[:]

    def _bucket(self, index: int) -> array[int]:
        if not self._spilled:
            return self._buckets[index]
        hashes = array("q")
        path = self._scratch / str(index)
        with storage_errors(path), open(path, "rb") as stream:
            hashes.frombytes(stream.read())
        hashes.extend(self._buckets[index])
        return hashes


def _repeated(hashes: array[int]) -> Collection[int]:
    seen: set[int] = set(hashes)
    if len(seen) == len(hashes):
        return ()
    repeated: set[int] = set()
    seen.clear()
    for digest in hashes:
        if digest in seen:
            repeated.add(digest)
        seen.add(digest)
    return repeated


def _duplicate_lines(
    lines: Iterator[Line], suspects: frozenset[int], keep_going: Callable[[], None]
) -> Iterator[int]:
    """The numbers of lines whose custom_id, compared in full, an earlier line used."""
    seen: set[str] = set()
    for count, line in enumerate(lines):
        if count % _TICK_EVERY == 0:
            keep_going()
        try:
            custom_id = _head.decode(line.text).custom_id
        except UNREADABLE:
            continue  # the consumer reports this line
        # Over-long ones are refused by the consumer, and too many of them would not fit in memory.
        if hash(custom_id) not in suspects or len(custom_id) > MAX_CUSTOM_ID:
            continue
        if custom_id in seen:
            yield line.number
        seen.add(custom_id)
