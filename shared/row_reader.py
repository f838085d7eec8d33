"""The lines of a batch as flat rows: each result joined with what was asked, for tables and exports.

Rows come in the order of the input, page by page under the cursor of :mod:`shared.results`, and one
line of the input is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from shared.batches import BatchStore
from shared.chat import Message
from shared.errors import NotFound, StorageFailed
from shared.files import FileStore
from shared.jobs import Batch
from shared.manifest import Chunk
from shared.result_rows import ResultRow, images_of, prompt_of
from shared.results import ResultPage, ResultStore, in_blocks
from shared.storage import storage_errors

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BOM = b"\xef\xbb\xbf"


# --- what was asked ---------------------------------------------------------------------------


class _Body(msgspec.Struct, frozen=True):
    messages: list[Message]


class _InputLine(msgspec.Struct, frozen=True):
    body: _Body


_input = msgspec.json.Decoder(_InputLine)


class _InputFile:
    """The requests of a JSONL file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """The lines of a chunk by number, one at a time. Raises: StorageFailed."""
        with storage_errors(self._path), open(self._path, "rb") as stream:
            stream.seek(chunk.offset)
            left, number = chunk.length, chunk.first_line
            while left:
                text = stream.readline(left)
                if not text:
                    raise StorageFailed(f"{self._path} is shorter than when the batch was planned")
                left -= len(text)
                yield number, text
                number += 1


class _NoInput:
    """Of a file that was deleted nothing is known."""

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """Nothing."""
        return iter(())


def _line_of(lines: Iterator[tuple[int, bytes]], wanted: int) -> bytes | None:
    """The line of that number; those before it are passed over."""
    for number, text in lines:
        if number == wanted:
            return text
    return None


def _messages_of(text: bytes) -> list[Message] | None:
    try:
        return _input.decode(text.removeprefix(_BOM)).body.messages
    except _UNREADABLE:
        return None


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


def _row(number: int, line: bytes, asked: list[Message] | None, model: str | None) -> ResultRow:
    found = _result.decode(line)
    body = found.response.body if found.response is not None else _ResponseBody()
    problem = found.error or body.error
    choice = body.choices[0] if body.choices else _Choice(_Answer())
    images = images_of(asked or [])
    return ResultRow(
        line=number,
        custom_id=found.custom_id,
        image=_address(images[0]) if images else None,
        prompt=prompt_of(asked or []),
        caption=None if problem is not None else choice.message.content or "",
        model=body.model or model,
        finish_reason=choice.finish_reason,
        prompt_tokens=body.usage.prompt_tokens,
        completion_tokens=body.usage.completion_tokens,
        error_code=None if problem is None else problem.code or "unknown",
        error=None if problem is None else problem.message,
    )


def _address(url: str) -> str | None:
    return None if url[:5].lower() == "data:" else url


# --- both -------------------------------------------------------------------------------------


class RowPage:
    """Some rows in the order of the input, to be streamed; a cursor as of a ``ResultPage``."""

    def __init__(
        self, page: ResultPage, asked: _InputFile | _NoInput, batch: Batch, *, with_messages: bool
    ) -> None:
        self.next_after = page.next_after
        self.complete = page.complete
        self._page = page
        self._asked = asked
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
            asked = self._asked.lines(chunk)
            for number, line in lines:
                yield self._joined(number, line, _line_of(asked, number))

    def _joined(self, number: int, line: bytes, text: bytes | None) -> ResultRow:
        asked = None if text is None else _messages_of(text)
        try:
            row = _row(number, line, asked, self._model)
        except _UNREADABLE as error:
            raise StorageFailed(f"the result of line {number} is damaged: {error}") from error
        if not self._with_messages:
            return row
        return msgspec.structs.replace(row, messages=asked)


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
        return RowPage(page, self._input(batch, with_messages), batch, with_messages=with_messages)

    def _input(self, batch: Batch, with_messages: bool) -> _InputFile | _NoInput:  # noqa: FBT001
        try:
            return _InputFile(self._files.content_path(batch.owner, batch.input_file_id))
        except NotFound:
            if not with_messages:
                return _NoInput()
            raise NotFound(
                f"the batch's input file '{batch.input_file_id}' was deleted, and with it what was "
                "asked; leave 'messages' out",
                param="input_file_id",
            ) from None
