"""Rows from a finished batch: each request that was answered, with its answer as what to learn."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from shared.chat import ChatRequest, Message
from shared.errors import RowUnusable
from shared.storage import storage_errors
from workers.inference.batch_lines import UNREADABLE
from workers.training.row_files import RawRow, read_rows
from workers.training.row_formats import row_of_messages
from workers.training.row_table import scratch_database, scratch_errors
from workers.training.rows import Row


class BatchFiles(msgspec.Struct, frozen=True):
    """Where the lines of a finished batch are; a batch without failures has no ``errors``."""

    input: Path
    output: Path | None
    errors: Path | None


class _Answer(msgspec.Struct, frozen=True):
    content: str


class _Choice(msgspec.Struct, frozen=True):
    message: _Answer
    finish_reason: str = ""


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _Response(msgspec.Struct, frozen=True):
    body: _Completion


class _OutputLine(msgspec.Struct, frozen=True):
    custom_id: str
    response: _Response


class _ErrorLine(msgspec.Struct, frozen=True):
    custom_id: str | None = None
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def code(self) -> str:
        """Why the line failed."""
        body = (self.response or {}).get("body")
        found = self.error or (body.get("error") if isinstance(body, dict) else None) or {}
        return str(found.get("code") or "unknown")


class _InputLine(msgspec.Struct, frozen=True):
    custom_id: str
    body: ChatRequest


_output = msgspec.json.Decoder(_OutputLine)
_error = msgspec.json.Decoder(_ErrorLine)
_input = msgspec.json.Decoder(_InputLine)


def read_batch(
    files: BatchFiles, scratch: Path, max_row_bytes: int, param: str
) -> Iterator[tuple[RawRow, Row | RowUnusable]]:
    """Every line of the batch's input, joined with its answer by ``custom_id``.

    ``scratch`` is a file to be made, ``param`` names the batch in errors. Raises: StorageFull, StorageFailed, DatasetInvalid.
    """
    answers = _Answers(scratch)
    try:
        answers.read(files, max_row_bytes, param)
        for raw in read_rows(files.input, max_row_bytes, param):
            try:
                yield raw, _joined(raw.text, answers)
            except RowUnusable as error:
                yield raw, error
    finally:
        answers.close()
        with storage_errors(scratch):
            scratch.unlink(missing_ok=True)


def cut_answer() -> RowUnusable:
    """An answer that is not whole."""
    return RowUnusable(
        "the answer was cut at the batch's max_tokens; what is learned would end like it",
        param="max_tokens",
        reason="answer_cut",
    )


def failed_line(code: str) -> RowUnusable:
    """A line without an answer; ``code`` is why."""
    return RowUnusable(f"this line of the batch failed ({code})", reason="batch_line_failed")


def _joined(text: bytes, answers: _Answers) -> Row:
    try:
        line = _input.decode(text)
    except UNREADABLE:
        raise RowUnusable("the batch refused this line", reason="batch_line_failed") from None
    answer = answers.take(line.custom_id)
    return row_of_messages([*line.body.messages, Message("assistant", answer)])


class _Answers:
    """Answers by custom_id, on disk; each is given out once, as a batch answers an id once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base: sqlite3.Connection = scratch_database(
            path, "create table answers (id text primary key, content text, reason text)"
        )

    def read(self, files: BatchFiles, max_row_bytes: int, param: str) -> None:
        if files.output is not None:
            for raw in read_rows(files.output, max_row_bytes, param):
                self._add_output(raw.text)
        if files.errors is not None:
            for raw in read_rows(files.errors, max_row_bytes, param):
                self._add_error(raw.text)

    def take(self, custom_id: str) -> str:
        with scratch_errors(self._path):
            found = self._base.execute(
                "delete from answers where id = ? returning content, reason", (custom_id,)
            ).fetchone()
        if found is None:
            raise RowUnusable(
                "the batch has no answer to this line",
                param="custom_id",
                reason="batch_line_failed",
            )
        content, reason = found
        if reason == "length":
            raise cut_answer()
        if content is None:
            raise failed_line(reason)
        return str(content)

    def close(self) -> None:
        self._base.close()

    def _add_output(self, text: bytes) -> None:
        try:
            line = _output.decode(text)
        except UNREADABLE:
            return  # its input line is then reported as having no answer
        if line.response.body.choices:
            choice = line.response.body.choices[0]
            self._add(line.custom_id, choice.message.content, choice.finish_reason)

    def _add_error(self, text: bytes) -> None:
        try:
            line = _error.decode(text)
        except UNREADABLE:
            return
        if line.custom_id is not None:
            self._add(line.custom_id, None, line.code)

    def _add(self, custom_id: str, content: str | None, reason: str) -> None:
        with scratch_errors(self._path):
            self._base.execute(
                "insert or ignore into answers values (?, ?, ?)", (custom_id, content, reason)
            )
