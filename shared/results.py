"""The lines of a batch in the order of its input, readable while it runs and after it has ended.

A cursor is the number of an input line: everything up to it was delivered. While the batch runs,
lines come from the committed shards; then from the output and error files, where an index written
before the batch ends says which bytes are whose chunk's. Both hold the same lines under the same
numbers, so a cursor stays good across that change, a rebuild of Redis, and a chunk done again.
"""

from __future__ import annotations

import heapq
import os
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared.batches import BatchStore
from shared.errors import InvalidRequest, InvalidValue, NotFound, StorageFailed
from shared.files import FileStore
from shared.jobs import Batch, BatchState
from shared.manifest import Chunk, Manifest
from shared.shards import error_part, output_part, read_header, shard_path
from shared.storage import storage_errors, write_bytes

_INDEX = "results.bin"
_RECORD = struct.Struct("<QQQQ")
_BLOCK_BYTES = 64 * 1024
_LINE_ID = re.compile(rb'\{"id":"batch_req_[^"]*_(\d{1,20})"')


class Part(msgspec.Struct, frozen=True):
    """Some whole lines: ``length`` bytes at ``offset`` of ``path``."""

    path: Path
    offset: int
    length: int

    def lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Each line with its number in the input. Raises: StorageFailed where it is damaged."""
        stream.seek(self.offset)
        left = self.length
        while left:
            line = stream.readline(left)
            found = _LINE_ID.match(line)
            if not line.endswith(b"\n") or found is None:
                raise StorageFailed(f"{self.path} is damaged at byte {stream.tell() - len(line)}")
            left -= len(line)
            yield int(found[1]), line


class Span(msgspec.Struct, frozen=True):
    """Where one chunk's lines are in the output and error files."""

    output_offset: int
    output_bytes: int
    error_offset: int
    error_bytes: int


class IndexWriter:
    """Notes, while result files are joined, which bytes of them belong to which chunk."""

    def __init__(self, chunks: int) -> None:
        self._values = array("Q", bytes(_RECORD.size * chunks))
        self._ends = [0, 0]

    def output(self, chunk: int, length: int) -> None:
        """The next ``length`` bytes of the output file are the chunk's."""
        self._note(chunk, 0, length)

    def errors(self, chunk: int, length: int) -> None:
        """The next ``length`` bytes of the error file are the chunk's."""
        self._note(chunk, 1, length)

    def write(self, folder: Path) -> None:
        """Write the index of the batch in ``folder``. Raises: StorageFull, StorageFailed."""
        values = self._values[:]
        if struct.pack("=H", 1) != struct.pack("<H", 1):
            values.byteswap()
        write_bytes(folder / _INDEX, values.tobytes())

    def _note(self, chunk: int, part: int, length: int) -> None:
        at = 4 * chunk + 2 * part
        self._values[at : at + 2] = array("Q", (self._ends[part], length))
        self._ends[part] += length


class Index:
    """Reads what an :class:`IndexWriter` wrote. Raises StorageFailed where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _INDEX
        with storage_errors(self._path):
            self.chunks = self._path.stat().st_size // _RECORD.size

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the batch's result files were joined."""
        return (folder / _INDEX).exists()

    def span(self, chunk: int) -> Span:
        """Where the lines of a chunk are."""
        with storage_errors(self._path), open(self._path, "rb") as stream:
            record = os.pread(stream.fileno(), _RECORD.size, chunk * _RECORD.size)
        if len(record) != _RECORD.size:
            raise StorageFailed(f"{self._path} has no chunk {chunk}")
        return Span(*_RECORD.unpack(record))


class ResultPage:
    """Some lines in the order of the input, to be streamed.

    ``next_after`` is the cursor that the next page follows, ``complete`` says that none will.
    """

    def __init__(
        self, source: _Source, chunks: range, *, after: int, next_after: int, complete: bool
    ) -> None:
        self.next_after = next_after
        self.complete = complete
        self._source = source
        self._chunks = chunks
        self._after = after

    def blocks(self) -> Iterator[bytes]:
        """The lines, in blocks of some 64 KiB; one line and one block are in memory.

        Raises: StorageFailed; NotFound if a result file is deleted meanwhile.
        """
        return in_blocks(line for _, lines in self.chunks() for _, line in lines)

    def chunks(self) -> Iterator[tuple[Chunk, Iterator[tuple[int, bytes]]]]:
        """The chunks, each with its lines that belong to the page, by number. Raises: as ``blocks``."""
        for index in self._chunks:
            lines = self._source.lines(index)
            wanted = (item for item in lines if self._after < item[0] <= self.next_after)
            yield self._source.chunk(index), wanted


def in_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines joined into blocks of some 64 KiB."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


class ResultStore:
    """Read the lines of batches."""

    def __init__(self, batches: BatchStore, files: FileStore) -> None:
        self._batches = batches
        self._files = files

    def page(self, owner: str, batch_id: str, *, after: int, limit: int) -> ResultPage:
        """Up to ``limit`` lines after the input's line number ``after``.

        A line is delivered when its chunk and all chunks before it are committed.
        Raises: NotFound; InvalidValue for ``after``; InvalidRequest if it has no index.
        """
        batch = self._batches.get(owner, batch_id)
        folder = self._batches.folder(batch_id)
        if not _has_lines(batch, folder):
            # The state above may be older than the manifest, never the other way round.
            _require(after, is_known=after == 0)
            source = _Source(self._batches, self._files, batch, None, 0, ())
            return ResultPage(source, range(0), after=0, next_after=0, complete=batch.is_terminal)
        manifest = Manifest(folder)
        first = manifest.chunk_of_line(after + 1)
        # Tokens first: they are gone when the batch has ended, and its state then says so.
        tokens = self._batches.committed_tokens(batch_id, first, limit)
        # The manifest of an image set may have grown since it was read.
        tokens = tokens[: max(0, manifest.plan.chunks - first)]
        batch = self._batches.get(owner, batch_id)
        source = _Source(self._batches, self._files, batch, manifest, first, tokens)
        return _cut(source, first, after, limit)

    def failed_lines(self, batch: Batch) -> Iterator[tuple[Chunk, frozenset[int]]]:
        """The numbers of the failed lines of a batch that has ended, by chunk, in order.

        Raises: InvalidRequest if it has no index, NotFound if its error file was deleted.
        """
        folder = self._batches.folder(batch.id)
        if not _has_lines(batch, folder):
            return
        manifest = Manifest(folder)
        source = _Source(self._batches, self._files, batch, manifest, 0, ())
        for index in range(source.end):
            numbers = frozenset(source.failed(index))
            if numbers:
                yield manifest.chunk(index), numbers


def _has_lines(batch: Batch, folder: Path) -> bool:
    return batch.state != BatchState.FAILED and Manifest.exists(folder)


class _Source:
    """Where the lines of one batch's chunks are now. Chunks below ``end`` can be read."""

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        batch: Batch,
        manifest: Manifest | None,
        first: int,
        tokens: Sequence[int],
    ) -> None:
        self._batches = batches
        self._files = files
        self._batch = batch
        self._folder = batches.folder(batch.id)
        self._manifest = manifest
        self._first = first
        self._tokens = tokens
        self._index: Index | None = self._open_index() if batch.is_terminal and manifest else None
        self.is_terminal = batch.is_terminal
        self.chunks = manifest.plan.chunks if manifest else 0
        self.end = first + len(tokens)
        if self._index is not None:
            # A batch that was stopped before it was planned may have got a manifest too late.
            self.chunks = self.end = self._index.chunks

    def chunk(self, index: int) -> Chunk:
        """The manifest's entry."""
        assert self._manifest is not None, "only a planned batch has chunks"
        return self._manifest.chunk(index)

    def lines(self, index: int) -> Iterator[tuple[int, bytes]]:
        """The lines of a chunk, answers and errors, by number."""
        with ExitStack() as opened:
            parts = [part.lines(stream) for part, stream in self._open(index, opened)]
            yield from heapq.merge(*parts, key=lambda item: item[0])

    def failed(self, index: int) -> Iterator[int]:
        """The numbers of the error lines of a chunk of a batch that has ended."""
        with ExitStack() as opened:
            for part, stream in _opened([self._final(index)[1]], opened):
                for number, _ in part.lines(stream):
                    yield number

    def last_line(self, index: int) -> int:
        """The number of the last line before the next chunk, or else of the chunk's last."""
        if index + 1 < self.chunks:
            return self.chunk(index + 1).first_line - 1
        return max((number for number, _ in self.lines(index)), default=0)

    def _open(self, index: int, opened: ExitStack) -> Sequence[tuple[Part, BinaryIO]]:
        if self._index is None:
            path = shard_path(self._folder, index, self._tokens[index - self._first])
            try:
                header = read_header(path)
                parts = [Part(path, *output_part(header)), Part(path, *error_part(header))]
                return _opened(parts, opened)
            except StorageFailed:
                # Gone, if the batch has ended since; its files have what the shard had.
                self._batch = self._batches.get(self._batch.owner, self._batch.id)
                if not self._batch.is_terminal:
                    raise
                self._index = self._open_index()
        return _opened(self._final(index), opened)

    def _final(self, index: int) -> Sequence[Part]:
        assert self._index is not None, "the batch has not ended"
        span, batch = self._index.span(index), self._batch
        output = self._result_file(batch.output_file_id, "output_file_id", span.output_bytes)
        errors = self._result_file(batch.error_file_id, "error_file_id", span.error_bytes)
        return [
            Part(output, span.output_offset, span.output_bytes),
            Part(errors, span.error_offset, span.error_bytes),
        ]

    def _result_file(self, file_id: str | None, param: str, length: int) -> Path:
        if not length:
            return self._folder  # nothing of it is read
        if file_id is None:
            raise StorageFailed(f"{self._folder} has lines in a result file that is not named")
        try:
            return self._files.content_path(self._batch.owner, file_id)
        except NotFound:
            raise NotFound(f"the batch's {param} '{file_id}' was deleted", param=param) from None

    def _open_index(self) -> Index:
        if not Index.exists(self._folder):
            raise InvalidRequest(
                "the batch ended under a version without this; read output_file_id and "
                "error_file_id instead",
                param="batch_id",
            )
        return Index(self._folder)


def _opened(parts: Sequence[Part], opened: ExitStack) -> Sequence[tuple[Part, BinaryIO]]:
    """The parts that are not empty, opened until ``opened`` closes."""
    found: list[tuple[Part, BinaryIO]] = []
    for part in parts:
        if part.length:
            with storage_errors(part.path):
                stream = opened.enter_context(open(part.path, "rb"))  # noqa: SIM115 - it is one
                found.append((part, stream))
    return found


def _cut(source: _Source, first: int, after: int, limit: int) -> ResultPage:
    """The page of up to ``limit`` lines that begins in chunk ``first``."""
    if source.chunks == 0:
        _require(after, is_known=after == 0)
    index, left, next_after, is_whole = first, limit, after, True
    while index < source.end and left > 0:
        chunk = source.chunk(index)
        if chunk.first_line > after and chunk.items <= left:
            left -= chunk.items
            next_after = source.last_line(index)
        else:
            numbers = sorted(number for number, _ in source.lines(index) if number > after)
            is_whole = len(numbers) <= left
            if is_whole:
                next_after = source.last_line(index)
                _require(after, is_known=next_after >= after)
            else:
                next_after = numbers[left - 1]
            left -= min(left, len(numbers))
        index += 1
    complete = source.is_terminal and is_whole and index >= source.chunks
    return ResultPage(
        source, range(first, index), after=after, next_after=next_after, complete=complete
    )


def _require(after: int, *, is_known: bool) -> None:
    if not is_known:
        raise InvalidValue(
            f"after: {after} is no line of this batch; pass vlmq-next-after of an earlier answer, "
            "or 0 to begin",
            param="after",
        )
