"""One line of a batch: read, checked, answered."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.chat import completion_body
from shared.errors import (
    BatchCancelled,
    BodyTooLarge,
    EngineCrashed,
    InvalidJson,
    InvalidRequest,
    ModelNotFound,
    StorageFailed,
    UnsupportedParameter,
    VlmqError,
)
from shared.manifest import Chunk
from workers.inference.batch_lines import (
    Line,
    error_line,
    item_id,
    output_line,
    parse_line,
    problem_of,
    read_chunk,
    split_lines,
)

ENDPOINT = "/v1/chat/completions"
GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": ENDPOINT,
    "body": {"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
}


def parse(text: bytes, *, number: int = 7, duplicates: frozenset[int] = frozenset()) -> Any:
    """Parse a line of a batch that runs on ``echo``."""
    return parse_line(
        Line(number, text),
        endpoint=ENDPOINT,
        model="echo",
        knows_model={"echo", "other"}.__contains__,
        duplicates=duplicates,
        max_line_bytes=1000,
    )


def changed(**fields: Any) -> bytes:
    """The good line with other fields; ``None`` takes one away; ``body`` is merged."""
    line = {**GOOD, **fields}
    if isinstance(fields.get("body"), dict):
        line["body"] = {**GOOD["body"], **fields["body"]}
    return json.dumps({name: value for name, value in line.items() if value is not None}).encode()


def test_a_good_line_is_read() -> None:
    """With its body as HTTP reads it."""
    parsed = parse(changed(body={"max_tokens": 5}))
    assert (parsed.custom_id, parsed.body.model, parsed.body.token_limit) == ("a", "echo", 5)


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"nonsense", "invalid_json", None),
        (b"{} {}", "invalid_value", "custom_id"),
        (json.dumps(GOOD).encode() + b"x", "invalid_json", None),
        (b"[]", "invalid_value", None),
        (b'"text"', "invalid_value", None),
        (b'{"custom_id": "\xff"}', "invalid_json", None),
        (changed(custom_id=None), "invalid_value", "custom_id"),
        (changed(custom_id=5), "invalid_value", "custom_id"),
        (changed(custom_id=""), "invalid_value", "custom_id"),
        (changed(custom_id="x" * 513), "invalid_value", "custom_id"),
        (changed(method=None), "invalid_value", "method"),
        (changed(method="GET"), "invalid_value", "method"),
        (changed(url="/v1/embeddings"), "invalid_value", "url"),
        (changed(body=[]), "invalid_value", "body"),
        (changed(body={"model": "other"}), "model_mismatch", "model"),
        (changed(body={"model": 1}), "invalid_value", "model"),
        (changed(body={"messages": []}), "invalid_value", "messages"),
        (changed(body={"messages": [{"role": "u", "content": ""}]}), "invalid_value",
         "messages[0].role"),
        (changed(body={"temperature": "hot"}), "invalid_value", "temperature"),
        (changed(body={"temperature": 3}), "invalid_value", "temperature"),
        (changed(body={"n": 2}), "invalid_value", "n"),
        (changed(body={"stream": True}), "invalid_value", "stream"),
        (changed(body={"logit_bias": {}}), "unsupported_parameter", "logit_bias"),
        (changed(body={"stop": [""]}), "invalid_value", "stop"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_by_name(text: bytes, code: str, param: str | None) -> None:
    """With the code and the parameter that HTTP would give."""
    with pytest.raises(InvalidRequest) as refused:
        parse(text)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_a_model_that_is_not_linked_is_told_from_another_batchs() -> None:
    """A mismatch is mended in the file, a missing model on the server."""
    with pytest.raises(ModelNotFound, match="nobody"):
        parse(changed(body={"model": "nobody"}))


def test_a_line_that_is_too_long_was_not_read() -> None:
    """It says how long lines may be."""
    with pytest.raises(BodyTooLarge, match="1000"):
        parse(b"")


def test_a_repeated_custom_id_is_refused() -> None:
    """A broken line that repeats one is told that it is broken."""
    with pytest.raises(InvalidRequest) as refused:
        parse(changed(), duplicates=frozenset({7}))
    assert (refused.value.code, refused.value.param) == ("duplicate_custom_id", "custom_id")
    with pytest.raises(UnsupportedParameter):
        parse(changed(body={"tools": []}), duplicates=frozenset({7}))


def test_brackets_a_thousand_deep_are_broken_json() -> None:
    """Anywhere in the line, and its custom_id is given up as well."""
    deep = b"[" * 50_000 + b"]" * 50_000
    text = b'{"custom_id": "a", "x": ' + deep + b"}"
    with pytest.raises(InvalidJson):
        parse(text)
    assert Line(1, text).custom_id() is None


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    """Nothing but the documented errors comes out."""
    Line(1, text).custom_id()
    with pytest.raises((InvalidRequest, BodyTooLarge)):
        parse(text)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
), st.sampled_from([*GOOD, "model", "messages", "seed", "stop", "stream", "max_tokens"]))  # fmt: skip
def test_any_value_of_any_field_is_read_or_refused(value: Any, field: str) -> None:
    """Nothing but the documented errors comes out."""
    text = changed(**{field: value}) if field in GOOD else changed(body={field: value})
    with contextlib.suppress(InvalidRequest, ModelNotFound):
        parse(text)


@pytest.mark.parametrize(
    ("text", "custom_id"),
    [
        (b'{"custom_id": "a"', None),
        (b'{"custom_id": "a", "method": 5}', "a"),
        (b'{"custom_id": 5}', None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_the_custom_id_of_a_wrong_line(text: bytes, custom_id: str | None) -> None:
    """It is told if it can be made out, so that its owner finds the line."""
    assert Line(1, text).custom_id() == custom_id


def test_lines_keep_their_numbers() -> None:
    """Blank ones are left out; a chunk without text is one over-long line."""
    assert split_lines(b"a\n\n \r\nb\r\nc", 10) == [
        Line(10, b"a"),
        Line(13, b"b\r"),
        Line(14, b"c"),
    ]
    assert split_lines(b"", 5) == [Line(5, b"")]


def test_a_file_that_was_cut_is_noticed(tmp_path: Path) -> None:
    """A chunk is read whole or not at all."""
    source = tmp_path / "input"
    source.write_bytes(b"0123456789")
    assert read_chunk(source, Chunk(0, 2, 5, 1, 1)) == b"23456"
    with pytest.raises(StorageFailed):
        read_chunk(source, Chunk(0, 8, 5, 1, 1))


def test_an_output_line_has_openais_shape() -> None:
    """Its ids follow from the batch and the line."""
    body = completion_body(
        completion_id="chatcmpl-1",
        created=5,
        model="echo",
        text="hi",
        finish_reason="stop",
        prompt_tokens=1,
        completion_tokens=2,
    )
    text = output_line(item_id("batch_abc", 3), "a", body)
    assert text.endswith(b"}\n")
    row = json.loads(text)
    assert (row["id"], row["custom_id"], row["error"]) == ("batch_req_abc_3", "a", None)
    assert (row["response"]["status_code"], row["response"]["request_id"]) == (200, "req_abc_3")
    assert row["response"]["body"]["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidJson("bad"), 400), (EngineCrashed(), 503), (BodyTooLarge("long"), 413)],
)
def test_an_error_line_says_what_http_would_have_said(error: VlmqError, status: int) -> None:
    """Status, and the error object with all its keys."""
    row = json.loads(error_line("abc_3", None, error))
    assert (row["custom_id"], row["error"]) == (None, None)
    assert row["response"]["status_code"] == status
    assert set(row["response"]["body"]["error"]) == {"message", "type", "param", "code"}
    assert row["response"]["body"]["error"]["code"] == error.code


def test_a_request_that_never_ran_says_why_in_error() -> None:
    """There is no response then."""
    row = json.loads(error_line("abc_3", "a", BatchCancelled(), in_batch=True))
    assert row["response"] is None
    assert set(row["error"]) == {"code", "message"}
    assert row["error"]["code"] == "batch_cancelled"


def test_a_problem_points_at_its_line() -> None:
    """For the batch's own list of errors."""
    problem = problem_of(Line(12, b"x"), InvalidJson("bad", param="p"))
    assert (problem.code, problem.param, problem.line) == ("invalid_json", "p", 12)
