"""The chat request, as HTTP and batches read it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.chat import parse_chat_request
from shared.errors import InvalidJson, InvalidRequest

USER = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "file-1"}}


def body(**fields: Any) -> bytes:
    """A good request with other fields."""
    return json.dumps({"model": "m", "messages": [USER], **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"stop": "x"},
        {"stop": ["x"] * 16},
        {"stop": None, "seed": -1, "n": 1, "user": "u"},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": ""}]}]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}, USER]},
        {"messages": [{**USER, "name": "ann"}]},
        {"top_k": 0, "repetition_penalty": 1.1, "min_new_tokens": 3},
    ],
)
def test_what_is_supported_is_read(fields: dict[str, Any]) -> None:
    """Every parameter that the documentation lists."""
    parse_chat_request(body(**fields))


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": ""}, "invalid_value", "model"),
        ({"model": None}, "invalid_value", "model"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            "invalid_value",
            "messages[1].role",
        ),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": [IMAGE]}]},
            "invalid_value",
            "messages[0].content[0]",
        ),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"n": 2}, "invalid_value", "n"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        ({"response_format": {"type": "json_object"}}, "invalid_value", "response_format.type"),
        ({"tools": []}, "unsupported_parameter", "tools"),
        ({"logprobs": False}, "unsupported_parameter", "logprobs"),
        (
            {"messages": [{**USER, "tool_calls": []}]},
            "unsupported_parameter",
            "messages[0].tool_calls",
        ),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "unsupported_parameter",
            "stream_options.x",
        ),
    ],
)
def test_what_is_not_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    """Never silently ignored."""
    with pytest.raises(InvalidRequest) as refused:
        parse_chat_request(body(**fields))
    assert (refused.value.code, refused.value.param) == (code, param)
    assert param.rpartition(".")[2] in refused.value.message or code == "invalid_value"


@pytest.mark.parametrize("raw", [b"", b"{", b"nul", b'{"model": "\xff"}', body() + b","])
def test_what_is_not_json_says_so(raw: bytes) -> None:
    """Broken UTF-8 included."""
    with pytest.raises(InvalidJson):
        parse_chat_request(raw)


@pytest.mark.parametrize("field", ["model", "messages", "stop", "user", "zzz", "response_format"])
def test_brackets_a_thousand_deep_are_refused(field: str) -> None:
    """As any other wrong value."""
    deep = b"[" * 50_000 + b"]" * 50_000
    raw = b'{"' + field.encode() + b'": ' + deep + b', "model": "m", "messages": []}'
    with pytest.raises(InvalidRequest):
        parse_chat_request(raw)
