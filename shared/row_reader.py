"""The lines of a batch as flat rows: each result joined with what was asked, for tables and exports.

Rows come in the order of the input, page by page under the cursor of :mod:`shared.results`, and one
line of the input is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from shared.asked import UNREADABLE, Asked, BatchInput, FileInput, NoInput, SetInput
from shared.batches import BatchStore
from shared.errors import NotFound, StorageFailed
from shared.files import FileStore
from shared.jobs import Batch
from shared.manifest import Manifest
from shared.result_rows import ResultRow
from shared.results import ResultPage, ResultStore, in_blocks

# --- what was answered ------------------------------------------------------------------------


class _Answer(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Answer
    finish_reason: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Problem(msgspec.Struct, frozen=True):
    code: str | None = None
    message: str | None = None


class _ResponseBody(msgspec.Struct, frozen=True):
    model: str | None = None
    choices: list[_Choice] = []
    usage: _Usage = _Usage()
    error: _Problem | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _ResponseBody


class _ResultLine(msgspec.Struct, frozen=True):
    custom_id: str | None = None
    response: _Response | None = None
    error: _Problem | None = None


_result = msgspec.json.Decoder(_ResultLine)
_encoder = msgspec.json.Encoder()


def _line_of(lines: Iterator[tuple[int, bytes]], wanted: int) -> bytes | None:
    """The line of that number; those before it are passed over."""
    for number, text in lines:
        if number == wanted:
            return text
    return None


def _row(number: int, line: bytes, asked: Asked, model: str | None) -> ResultRow:
    found = _result.decode(line)
    body = found.response.body if found.response is not None else _ResponseBody()
    problem = found.error or body.error
    choice = body.choices[0] if body.choices else _Choice(_Answer())
    return ResultRow(
        line=number,
        custom_id=found.custom_id,
        image=asked.image,
        prompt=asked.prompt,
        caption=None if problem is not None else choice.message.content or "",
        model=body.model or model,
        finish_reason=choice.finish_reason,
        prompt_tokens=body.usage.prompt_tokens,
        completion_tokens=body.usage.completion_tokens,
        error_code=None if problem is None else problem.code or "unknown",
        error=None if problem is None else problem.message,
    )


# --- both -------------------------------------------------------------------------------------


class RowPage:
    """Some rows in the order of the input, to be streamed; a cursor as of a ``ResultPage``."""

    def __init__(
        self, page: ResultPage, source: BatchInput, batch: Batch, *, with_messages: bool
    ) -> None:
        self.next_after = page.next_after
        self.complete = page.complete
        self._page = page
        self._source = source
        self._model = batch.model
        self._with_messages = with_messages

    def blocks(self) -> Iterator[bytes]:
        """The rows as lines of JSON, in blocks of some 64 KiB.

        Raises: StorageFailed; NotFound if a file of the batch is deleted meanwhile.
        """
        return in_blocks(_encoder.encode(row) + b"\n" for row in self.rows())

    def rows(self) -> Iterator[ResultRow]:
        """The rows, one at a time. Raises: as ``blocks``."""
        for chunk, lines in self._page.chunks():
            requests = self._source.lines(chunk)
            for number, line in lines:
                text = _line_of(requests, number)
                asked = Asked() if text is None else self._source.asked(chunk, text)
                yield self._joined(number, line, asked)

    def _joined(self, number: int, line: bytes, asked: Asked) -> ResultRow:
        try:
            row = _row(number, line, asked, self._model)
        except UNREADABLE as error:
            raise StorageFailed(f"the result of line {number} is damaged: {error}") from error
        if not self._with_messages:
            return row
        return msgspec.structs.replace(row, messages=asked.messages, member=asked.member)


class RowReader:
    """Read the lines of batches as rows."""

    def __init__(self, batches: BatchStore, files: FileStore, results: ResultStore) -> None:
        self._batches = batches
        self._files = files
        self._results = results

    def page(
        self, owner: str, batch_id: str, *, after: int, limit: int, with_messages: bool = False
    ) -> RowPage:
        """Up to ``limit`` rows after the input's line number ``after``.

        Raises: as ``ResultStore.page``; NotFound if messages are wanted and the input was deleted.
        """
        page = self._results.page(owner, batch_id, after=after, limit=limit)
        batch = self._batches.get(owner, batch_id)
        source = self._input(batch, is_required=with_messages)
        return RowPage(page, source, batch, with_messages=with_messages)

    def _input(self, batch: Batch, *, is_required: bool) -> BatchInput:
        if batch.source is not None:
            folder = self._batches.folder(batch.id)
            if not Manifest.exists(folder):
                return NoInput()  # nor are there lines
            return SetInput(batch.source, Manifest(folder))
        assert batch.input_file_id is not None, "a batch has an input file or an image set"
        try:
            return FileInput(self._files.content_path(batch.owner, batch.input_file_id))
        except NotFound:
            if not is_required:
                return NoInput()
            raise NotFound(
                f"the batch's input file '{batch.input_file_id}' was deleted, and with it what was "
                "asked; leave 'messages' out",
                param="input_file_id",
            ) from None
