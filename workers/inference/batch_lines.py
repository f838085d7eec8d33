"""The lines of a batch: what comes in, and what goes out for each.

Every input line that is not blank becomes exactly one output line or one error line. Ids follow
from the batch and the line's number, so a line computed again gets the same ones.
Source: OpenAI's public API specification 2.3.0, ``BatchRequestInput`` and ``BatchRequestOutput``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec

from shared.chat import ChatCompletion, ChatRequest, explain
from shared.errors import (
    BodyTooLarge,
    DuplicateCustomId,
    InvalidJson,
    InvalidValue,
    ModelMismatch,
    ModelNotFound,
    StorageFailed,
    VlmqError,
)
from shared.jobs import BatchProblem
from shared.manifest import Chunk
from shared.quality import Verdict
from shared.statuses import error_body, status_of
from shared.storage import storage_errors

MAX_CUSTOM_ID = 512


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: ChatRequest


class _LooseLine(msgspec.Struct, frozen=True):
    custom_id: str


class _Response(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: ChatCompletion | dict[str, Any]


class _Problem(msgspec.Struct, frozen=True):
    code: str
    message: str


class LineExtras(msgspec.Struct, frozen=True, omit_defaults=True):
    """What OpenAI's line has no room for: the gate's verdict, and where else an answer came from.

    ``captioned_in`` is the batch that paid for it, ``same_as`` the line that has the same image.
    :mod:`shared.review` knows lines by a verdict that comes first.
    """

    quality: Verdict | None = None
    captioned_in: str | None = None
    same_as: str | None = None


class _ResultLine(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    custom_id: str | None
    response: _Response | None
    error: _Problem | None
    vlmq: LineExtras | None = None


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a line may raise: broken JSON, broken UTF-8, brackets nested a thousand deep."""

BOM = b"\xef\xbb\xbf"
"""Some editors begin a UTF-8 file with it; it belongs to no line."""


_strict = msgspec.json.Decoder(BatchLine)
_loose = msgspec.json.Decoder(_LooseLine)
_encoder = msgspec.json.Encoder()


class Line(msgspec.Struct, frozen=True):
    """A line that is not blank, with its number in the file, from 1."""

    number: int
    text: bytes

    def custom_id(self) -> str | None:
        """The custom_id if it can be made out."""
        try:
            return _loose.decode(self.text).custom_id
        except UNREADABLE:
            return None


def read_chunk(source: Path, chunk: Chunk) -> bytes:
    """The bytes of a chunk of the input file. Raises: StorageFailed if the file was cut."""
    with storage_errors(source), open(source, "rb") as stream:
        data = os.pread(stream.fileno(), chunk.length, chunk.offset)
    if len(data) != chunk.length:
        raise StorageFailed(f"{source} is shorter than when the batch was planned")
    return data


def split_lines(data: bytes, first_line: int) -> list[Line]:
    """The lines of a chunk. An unreadable chunk (``data`` empty) is one line without text."""
    if not data:
        return [Line(first_line, b"")]
    if first_line == 1:
        data = data.removeprefix(BOM)
    return [
        Line(number, text)
        for number, text in enumerate(data.split(b"\n"), first_line)
        if text and not text.isspace()
    ]


def parse_line(
    line: Line,
    *,
    endpoint: str,
    model: str,
    knows_model: Callable[[str], bool],
    duplicates: Collection[int],
    max_line_bytes: int,
) -> BatchLine:
    """Read and check one request.

    Raises: InvalidRequest or BodyTooLarge, naming the field below ``body`` as HTTP would.
    """
    if not line.text:
        raise BodyTooLarge(f"the line is longer than {max_line_bytes} bytes")
    try:
        parsed = _strict.decode(line.text)
    except msgspec.ValidationError as error:
        raise explain(error, root="body.") from None
    except UNREADABLE as error:
        raise InvalidJson(f"line {line.number} is not valid JSON: {error}") from None
    if line.number in duplicates:
        raise DuplicateCustomId(param="custom_id")
    _check_envelope(parsed, endpoint)
    if parsed.body.model != model:
        if not knows_model(parsed.body.model):
            raise ModelNotFound(f"there is no model '{parsed.body.model}'", param="model")
        raise ModelMismatch(
            f"this line asks for the model '{parsed.body.model}' but the batch runs on '{model}'; "
            "all lines of a batch must name the same model",
            param="model",
        )
    if parsed.body.stream:
        raise InvalidValue("a batch cannot stream; leave 'stream' out", param="stream")
    parsed.body.check()
    return parsed


def _check_envelope(parsed: BatchLine, endpoint: str) -> None:
    if not 0 < len(parsed.custom_id) <= MAX_CUSTOM_ID:
        raise InvalidValue(f"custom_id has 1 to {MAX_CUSTOM_ID} characters", param="custom_id")
    if parsed.method != "POST":
        raise InvalidValue("method must be POST", param="method")
    if parsed.url != endpoint:
        raise InvalidValue(f"url must be the batch's endpoint, {endpoint}", param="url")


def item_id(batch_id: str, line_number: int) -> str:
    """The unique part of the ids given to one line's answer."""
    return f"{batch_id.removeprefix('batch_')}_{line_number}"


def output_line(
    item: str, custom_id: str, body: ChatCompletion, extras: LineExtras | None = None
) -> bytes:
    """The line for a request that was answered."""
    response = _Response(200, f"req_{item}", body)
    line = _ResultLine(f"batch_req_{item}", custom_id, response, None, extras)
    return _encoder.encode(line) + b"\n"


def error_line(
    item: str, custom_id: str | None, error: VlmqError, *, in_batch: bool = False
) -> bytes:
    """The line for a request that failed.

    It says what HTTP would have answered, or, for a request that never ran (``in_batch``), why.
    """
    if in_batch:
        problem = _Problem(error.code, error.message)
        line = _ResultLine(f"batch_req_{item}", custom_id, None, problem)
    else:
        response = _Response(status_of(error), f"req_{item}", error_body(error))
        line = _ResultLine(f"batch_req_{item}", custom_id, response, None)
    return _encoder.encode(line) + b"\n"


def problem_of(line: Line, error: VlmqError) -> BatchProblem:
    """The entry of the batch's ``errors`` for an input line that was refused."""
    return BatchProblem(error.code, error.message, error.param, line.number)
