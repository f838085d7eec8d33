"""Where the requests of a chunk come from: the lines of a file, or the entries of an image set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from shared.captions import CaptionSource, Entry, Place, decode_entry, decode_place, request_of
from shared.chat import ChatRequest
from shared.errors import StorageFailed
from shared.jobs import BatchSpec
from shared.manifest import Chunk, Manifest
from shared.storage import Layout, storage_errors
from workers.inference.batch_lines import BatchLine, Line, parse_line, read_chunk, split_lines
from workers.inference.engines.base import Detail, Image
from workers.inference.entry_identity import load_as_listed
from workers.inference.entry_images import EntryImages
from workers.inference.prompts import ReadImage

Prepare = Callable[[bytes, Detail], Image]
"""Verifies an encoded image and cuts it; raises ImageError."""


class ChunkInput(Protocol):
    """The lines of a batch, whatever they are."""

    def lines(self, chunk: Chunk) -> Sequence[Line]:
        """The chunk's lines, one per item. Raises: StorageFailed."""
        ...

    def parse(self, line: Line, duplicates: frozenset[int]) -> BatchLine:
        """The request of a line. Raises: VlmqError if the line can only fail."""
        ...

    def complete(self, line: Line, request: BatchLine) -> tuple[ChatRequest, ReadImage]:
        """What is asked, and how its images are read; may read from disk. Raises: InvalidRequest."""
        ...

    def close(self) -> None:
        """Nothing more is read."""
        ...


class FileInput:
    """The lines of a JSONL file, each a request as it is."""

    def __init__(
        self,
        source: Path,
        *,
        endpoint: str,
        model: str,
        knows_model: Callable[[str], bool],
        max_line_bytes: int,
        read_image: ReadImage,
    ) -> None:
        self._source = source
        self._endpoint = endpoint
        self._model = model
        self._knows_model = knows_model
        self._max_line_bytes = max_line_bytes
        self._read_image = read_image

    def lines(self, chunk: Chunk) -> Sequence[Line]:
        """Read the chunk of the file."""
        return file_lines(self._source, chunk)

    def parse(self, line: Line, duplicates: frozenset[int]) -> BatchLine:
        """Read and check the line."""
        return parse_line(
            line,
            endpoint=self._endpoint,
            model=self._model,
            knows_model=self._knows_model,
            duplicates=duplicates,
            max_line_bytes=self._max_line_bytes,
        )

    def complete(self, line: Line, request: BatchLine) -> tuple[ChatRequest, ReadImage]:
        """The request is complete."""
        return request.body, self._read_image

    def close(self) -> None:
        """Nothing is open."""


class _EntryLine(Line, frozen=True):
    """A line of a manifest: an entry."""

    def entry(self) -> Entry:
        try:
            return decode_entry(self.text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StorageFailed(f"line {self.number} of the manifest is damaged: {error}") from None

    def custom_id(self) -> str | None:
        return self.entry().name


class ImageSetInput:
    """The entries of an image set, each asked about in the same words."""

    def __init__(
        self,
        source: CaptionSource,
        manifest: Manifest,
        images: EntryImages,
        prepare: Prepare,
    ) -> None:
        self._source = source
        self._asked = source.asked
        self._form = request_of(source, "")
        self._same = None if self._asked.columns else request_of(source, self._asked.fill({}))
        """The request, if it is the same for all images."""
        self._manifest = manifest
        self._images = images
        self._prepare = prepare
        self._places: dict[int, Place] = {}
        self._places_path: Path | None = None

    def lines(self, chunk: Chunk) -> Sequence[Line]:
        """Read the chunk of the manifest."""
        self._places_path = self._manifest.places(chunk.index)
        self._places.clear()
        return entry_lines(self._manifest, chunk)

    def parse(self, line: Line, duplicates: frozenset[int]) -> BatchLine:
        """The entry's request, its texts not filled in yet."""
        entry = entry_of(line)
        error = entry.error()
        if error is not None:
            raise error
        return BatchLine(entry.name, "POST", "", self._form)

    def complete(self, line: Line, request: BatchLine) -> tuple[ChatRequest, ReadImage]:
        """Fill in the texts."""
        entry = entry_of(line)
        place = self._place(entry.place)
        body = self._same
        if body is None:
            texts = self._images.texts(entry, place, self._asked.columns)
            body = request_of(self._source, self._asked.fill(texts))
        return body, lambda _, detail: self._prepare(
            load_as_listed(self._images, entry, place), detail
        )

    def close(self) -> None:
        """Close the archives."""
        self._images.close()

    def _place(self, offset: int) -> Place:
        if offset not in self._places:
            assert self._places_path is not None, "no chunk was read"
            self._places[offset] = read_place(self._places_path, offset)
        return self._places[offset]


def input_path(spec: BatchSpec, layout: Layout) -> Path | None:
    """Where the content of a batch's input file is, if it has one."""
    if spec.input_file_id is None:
        return None
    return layout.file_dir(spec.input_file_id) / "content"


def lines_of(
    spec: BatchSpec, manifest: Manifest, source: Path | None
) -> Callable[[Chunk], Sequence[Line]]:
    """Reads the lines of a batch's chunks; ``source`` is its input file, if it has one."""
    if spec.source is not None:
        return lambda chunk: entry_lines(manifest, chunk)
    assert source is not None, "a batch has an input file or an image set"
    return lambda chunk: file_lines(source, chunk)


def file_lines(source: Path, chunk: Chunk) -> Sequence[Line]:
    """The lines of a chunk of a JSONL file. Raises: StorageFailed."""
    return split_lines(read_chunk(source, chunk), chunk.first_line)


def entry_lines(manifest: Manifest, chunk: Chunk) -> Sequence[Line]:
    """The entries of a chunk of an image set. Raises: StorageFailed."""
    data = read_chunk(manifest.entries(chunk.index), chunk)
    texts = data.removesuffix(b"\n").split(b"\n")
    return [_EntryLine(number, text) for number, text in enumerate(texts, chunk.first_line)]


def entry_of(line: Line) -> Entry:
    """The entry that a line of an image set is. Raises: StorageFailed if it is damaged."""
    assert isinstance(line, _EntryLine), "the line is not of this input"
    return line.entry()


class PlacesOf:
    """The places of one chunk's entries, each read once. Raises: StorageFailed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[int, Place] = {}

    def at(self, offset: int) -> Place:
        """The place that begins at ``offset``."""
        if offset not in self._known:
            self._known[offset] = read_place(self._path, offset)
        return self._known[offset]


def read_place(path: Path, offset: int) -> Place:
    """The place that begins at ``offset`` of a file of places. Raises: StorageFailed."""
    with storage_errors(path), open(path, "rb") as stream:
        stream.seek(offset)
        line = stream.readline()
    try:
        return decode_place(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageFailed(f"{path} is damaged at byte {offset}: {error}") from None
