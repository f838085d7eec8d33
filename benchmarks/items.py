"""The job that is measured: a JSONL file of chat requests, and what its answers must be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

MODEL = "echo"
_WORDS = (
    *("a", "photo", "of", "the", "red", "blue", "small", "round", "bright", "wooden"),
    *("chair", "table", "street", "river", "harbour", "window", "cat", "dog", "bird", "tree"),
    *("beside", "under", "above", "near", "in", "morning", "evening", "light", "rain", "snow"),
)


class _Answer(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Answer


class _Body(msgspec.Struct):
    choices: list[_Choice]


class _Response(msgspec.Struct):
    status_code: int
    body: _Body


class _OutputLine(msgspec.Struct):
    custom_id: str
    response: _Response


_decoder = msgspec.json.Decoder(_OutputLine)


def item_text(number: int) -> str:
    """What item ``number`` says, twelve words: the echo engine's answer to it."""
    words = [_WORDS[(number * 7919 + place * place * 31) % len(_WORDS)] for place in range(11)]
    return f"{' '.join(words)} {number}"


def item_lines(items: int) -> Iterator[bytes]:
    """The lines of the input file, one request each, made as they are asked for."""
    for number in range(items):
        yield msgspec.json.encode(
            {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": item_text(number)}],
                    "max_tokens": 64,
                },
            }
        )


def write_input(path: Path, items: int) -> None:
    """Write the input file."""
    with open(path, "wb", buffering=1 << 20) as stream:
        stream.writelines(line + b"\n" for line in item_lines(items))


def check_output(lines: Iterator[bytes], items: int) -> None:
    """Raise AssertionError unless every item has exactly one, right answer."""
    seen = bytearray(items)
    for text in lines:
        line = _decoder.decode(text)
        number = int(line.custom_id.removeprefix("item-"))
        assert not seen[number], f"item {number} was answered twice"
        seen[number] = 1
        answer = line.response.body.choices[0].message.content
        assert line.response.status_code == 200, f"item {number} failed"
        assert answer == item_text(number), f"item {number} has the wrong answer {answer!r}"
    missing = seen.count(0)
    assert not missing, f"{missing} of {items} items have no answer"
