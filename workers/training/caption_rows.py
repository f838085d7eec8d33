"""Rows from a finished caption job: each image that has a caption, with what was asked and the caption.

Questions and images are read as the job read them: by path below the image roots, by offset from an
archive, as a cell of a table, as an upload. What is not as it was then is an unusable row. One chunk
of the job is in memory at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec

from shared.captions import CaptionSource, Entry, Place, request_of
from shared.chat import Message
from shared.errors import (
    DatasetInvalid,
    ImageError,
    InvalidRequest,
    NotFound,
    RowUnusable,
    StorageFailed,
    TextMissing,
)
from shared.jobs import Batch
from shared.manifest import Chunk, Manifest
from shared.quality import Verdict
from shared.results import ResultPage, ResultStore
from workers.inference.batch_lines import UNREADABLE
from workers.inference.chunk_input import PlacesOf, entry_lines, entry_of
from workers.inference.entry_identity import load_as_listed
from workers.inference.entry_images import EntryImages
from workers.training.batch_rows import cut_answer, failed_line
from workers.training.row_files import RawRow
from workers.training.row_formats import row_of_messages
from workers.training.rows import Row

FLAGGED = "flagged_"
"""What the reason of a row begins with whose caption the quality gate flagged."""
_PAGE_LINES = 4096

LoadBytes = Callable[[], bytes]
TakeImage = Callable[[str, LoadBytes], None]
"""Begins to store an image under an address; the call that loads it may raise ImageError."""


class CaptionWishes(msgspec.Struct, frozen=True):
    """What is taken otherwise than the job has it.

    ``prompt`` is asked about every image in place of what was; ``keep_flagged`` takes captions that the
    quality gate flagged as well.
    """

    prompt: str | None = None
    keep_flagged: bool = False


class CaptionBatch:
    """A finished caption job, to be read once. ``param`` is what names it in errors.

    ``open_images`` makes a reader of its images, one for each thread that reads; ``close`` closes
    them, when no thread reads any more. ``manifest`` is the job's.
    """

    def __init__(
        self,
        batch: Batch,
        results: ResultStore,
        manifest: Manifest,
        open_images: Callable[[], EntryImages],
        wishes: CaptionWishes,
        param: str,
    ) -> None:
        assert batch.source is not None, "a caption job has an image set"
        self._batch = batch
        self._source: CaptionSource = batch.source
        self._template = batch.source.asked
        self._results = results
        self._manifest = manifest
        self._open_images = open_images
        self._wishes = wishes
        self._param = param
        self._of_thread = threading.local()
        self._opened: list[EntryImages] = []

    def rows(self, take_image: TakeImage) -> Iterator[tuple[RawRow, Row | RowUnusable]]:
        """Every image of the set by its number; the images of usable rows are taken.

        Raises: DatasetInvalid if the job's results were deleted; StorageFailed; QueueUnavailable.
        """
        try:
            yield from self._rows(take_image)
        except NotFound as error:
            raise self._gone(error) from None

    def close(self) -> None:
        """Close what was opened to read images."""
        while self._opened:
            self._opened.pop().close()

    def _rows(self, take_image: TakeImage) -> Iterator[tuple[RawRow, Row | RowUnusable]]:
        count = 0
        for chunk, lines in self._chunks():
            entries = [entry_of(line) for line in entry_lines(self._manifest, chunk)]
            places = PlacesOf(self._manifest.places(chunk.index))
            for number, text in lines:
                entry = self._entry(entries, chunk, number)
                count += 1
                raw = RawRow(count, number, text)
                try:
                    row = self._row(number, text, entry, places.at(entry.place), take_image)
                except RowUnusable as error:
                    yield raw, error
                else:
                    yield raw, row

    # --- what was answered ---------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[Chunk, Iterator[tuple[int, bytes]]]]:
        after = 0
        while True:
            page = self._page(after)
            yield from page.chunks()
            if page.complete:
                return
            if page.next_after <= after:
                raise StorageFailed(f"the results of {self._batch.id} end after line {after}")
            after = page.next_after

    def _page(self, after: int) -> ResultPage:
        try:
            return self._results.page(
                self._batch.owner, self._batch.id, after=after, limit=_PAGE_LINES
            )
        except InvalidRequest as error:  # it ended under a version that noted too little
            raise self._gone(error) from None

    def _gone(self, error: NotFound | InvalidRequest) -> DatasetInvalid:
        return DatasetInvalid(
            f"the batch '{self._batch.id}' cannot be learned from any more: {error.message}",
            param=self._param,
        )

    def _entry(self, entries: Sequence[Entry], chunk: Chunk, number: int) -> Entry:
        index = number - chunk.first_line
        if not 0 <= index < len(entries):
            raise StorageFailed(f"the manifest of {self._batch.id} has no line {number}")
        return entries[index]

    # --- a row ---------------------------------------------------------------------------------

    def _row(
        self, number: int, text: bytes, entry: Entry, place: Place, take_image: TakeImage
    ) -> Row:
        try:
            caption = self._caption(_line.decode(text))
        except UNREADABLE as error:
            raise StorageFailed(f"the result of line {number} is damaged: {error}") from None
        load = self._loader(entry, place)
        question = self._question(entry, place)
        asked = request_of(self._source, question).messages
        # Rows cannot name such an address: what they say after "data:" is taken for bytes.
        address = f"data:{self._batch.id}/{number}"
        row = row_of_messages([*asked, Message("assistant", caption)])
        take_image(address, load)
        return msgspec.structs.replace(row, image=address)

    def _caption(self, line: _Line) -> str:
        body = line.response.body if line.response is not None else _Body()
        problem = line.error or body.error
        if problem is not None or not body.choices:
            raise failed_line((problem and problem.code) or "unknown")
        verdict = line.vlmq.quality
        if verdict is not None and verdict.verdict == "review" and not self._wishes.keep_flagged:
            raise RowUnusable(
                f"the quality gate flagged the caption ({', '.join(verdict.reasons)}); with "
                "keep_flagged it is taken all the same",
                param="quality",
                reason=f"{FLAGGED}{verdict.reasons[0] if verdict.reasons else 'review'}",
                is_fault=False,
            )
        choice = body.choices[0]
        if choice.finish_reason == "length":
            raise cut_answer()
        return choice.message.content or ""

    def _question(self, entry: Entry, place: Place) -> str:
        if self._wishes.prompt is not None:
            return self._wishes.prompt
        try:
            texts = self._images().texts(entry, place, self._template.columns)
            return self._template.fill(texts)
        except TextMissing as error:
            raise RowUnusable(
                f"what was asked about this image is not known any more: {error.message}; the option "
                "prompt asks the same about all",
                param="prompt",
                reason=error.code,
            ) from None

    # --- images --------------------------------------------------------------------------------

    def _loader(self, entry: Entry, place: Place) -> LoadBytes:
        if place.type in {"image", "folder"} or entry.path is not None:
            return lambda: load_as_listed(self._images(), entry, place)
        # Members of archives and rows of tables come in their order, which several threads would lose.
        try:
            data = load_as_listed(self._images(), entry, place)
        except ImageError as error:
            raise RowUnusable(error.message, param="image", reason=error.code) from None
        return lambda: data

    def _images(self) -> EntryImages:
        images: EntryImages | None = getattr(self._of_thread, "images", None)
        if images is None:
            images = self._of_thread.images = self._open_images()
            self._opened.append(images)
        return images


# --- lines ------------------------------------------------------------------------------------


class _Answer(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Answer
    finish_reason: str | None = None


class _Problem(msgspec.Struct, frozen=True):
    code: str | None = None


class _Body(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    error: _Problem | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class _Extras(msgspec.Struct, frozen=True):
    quality: Verdict | None = None


class _Line(msgspec.Struct, frozen=True):
    """A line of the output or the error file."""

    response: _Response | None = None
    error: _Problem | None = None
    vlmq: _Extras = _Extras()


_line = msgspec.json.Decoder(_Line)
