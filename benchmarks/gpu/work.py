"""The requests of each row, and what their answers must be."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.gpu.photos import HD, PHOTO, SMALL, Kind

MODEL = "internvl2-2b"
PROMPT = "Describe this image."
NEW_TOKENS = 64
SAMPLING = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}
"""vlmq's defaults, told to both sides so that both do the same."""


class Work(msgspec.Struct, frozen=True):
    """One row: pictures of a kind, and how a request names them."""

    name: str
    title: str
    kind: Kind
    detail: Literal["auto", "low"] = "auto"
    inline: bool = False
    """Whether the JSONL file holds the pictures themselves, in base64."""


WORKS = {
    work.name: work
    for work in (
        Work("448", "448 px", SMALL),
        Work("448-base64", "448 px in base64", SMALL, inline=True),
        Work("1080p", "1920x1080", HD),
        Work("12mp", "12 megapixels, one tile", PHOTO, detail="low"),
    )
}


class Expected(msgspec.Struct, frozen=True):
    """What every answer must be."""

    items: int
    new_tokens: int


class Checked(msgspec.Struct, frozen=True):
    """What the answers of a batch came to."""

    prompt_tokens: float
    """The mean."""


class WrongAnswers(AssertionError):
    """A batch did not answer every item exactly once and as asked."""


def content_of(path: Path, work: Work) -> list[dict[str, Any]]:
    """The parts of the user's message about one picture."""
    url = str(path)
    if work.inline:
        url = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    image = {"url": url, "detail": work.detail}
    return [{"type": "image_url", "image_url": image}, {"type": "text", "text": PROMPT}]


def item_lines(
    paths: Sequence[Path], work: Work, items: int, new_tokens: int = NEW_TOKENS
) -> Iterator[bytes]:
    """The lines of a batch's input; item N is about picture N, going round."""
    for number in range(items):
        yield msgspec.json.encode(
            {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": MODEL,
                    "messages": [
                        {"role": "user", "content": content_of(paths[number % len(paths)], work)}
                    ],
                    "max_tokens": new_tokens,
                    "min_new_tokens": new_tokens,
                    **SAMPLING,
                },
            }
        )


def write_input(path: Path, lines: Iterable[bytes]) -> None:
    """Write a JSONL file."""
    with open(path, "wb", buffering=1 << 20) as stream:
        stream.writelines(line + b"\n" for line in lines)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Body(msgspec.Struct):
    usage: _Usage


class _Response(msgspec.Struct):
    status_code: int
    body: _Body


class _OutputLine(msgspec.Struct):
    custom_id: str
    response: _Response


_decoder = msgspec.json.Decoder(_OutputLine)


def check_answers(lines: Iterable[bytes], expected: Expected) -> Checked:
    """Check an output file: every item once, no error, every answer of its length.

    Raises: WrongAnswers naming the first item that is wrong.
    """
    seen = bytearray(expected.items)
    prompt_tokens = 0
    for text in lines:
        line = _decoder.decode(text)
        number = int(line.custom_id.removeprefix("item-"))
        if seen[number]:
            raise WrongAnswers(f"item {number} was answered twice")
        seen[number] = 1
        usage, status = line.response.body.usage, line.response.status_code
        if status != 200:
            raise WrongAnswers(f"item {number} was answered with HTTP {status}")
        if usage.completion_tokens != expected.new_tokens:
            raise WrongAnswers(
                f"item {number} has {usage.completion_tokens} tokens instead of "
                f"{expected.new_tokens}"
            )
        prompt_tokens += usage.prompt_tokens
    if missing := seen.count(0):
        raise WrongAnswers(f"{missing} of {expected.items} items have no answer")
    return Checked(prompt_tokens / expected.items)
