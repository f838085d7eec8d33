"""The formats that are text: flat JSONL, LLaVA's JSON array, OpenAI's lines for fine-tuning."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import msgspec

from cli.export.asked import Asked, answer_of
from cli.export.writing import LeftOut
from shared.chat import ImagePart, Message, TextPart
from shared.result_rows import ResultRow, images_of, text_of

IMAGE_TAG = "<image>"
_SYSTEM = frozenset({"system", "developer"})
_encoder = msgspec.json.Encoder()


class JsonlWriter:
    """One flat object per line, failed ones among them: ``image``, ``caption``, ``error`` and so on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def add(self, row: ResultRow) -> None:
        """Write one row."""
        self._stream.write(_encoder.encode(row) + b"\n")

    def close(self) -> None:
        """Nothing is left to write."""


class LlavaWriter:
    """A JSON array of ``{"id", "image", "conversations"}``; captions are what to learn."""

    def __init__(self, stream: BinaryIO, asked: Asked) -> None:
        self._stream = stream
        self._asked = asked
        self._separator = b"[\n"

    def add(self, row: ResultRow) -> None:
        """Write one row. Raises: LeftOut."""
        messages = self._asked.messages(row)
        value: dict[str, Any] = {"id": row.custom_id or str(row.line)}
        image = self._asked.only_image(row, messages)
        if image is not None:
            value["image"] = image
        said = [message for message in messages if message.role not in _SYSTEM]
        if len(said) < len(messages):
            # Not a turn: readers of this format know two roles.
            value["system"] = "\n".join(text_of(m) for m in messages if m.role in _SYSTEM)
        value["conversations"] = [_turn(message) for message in (*said, answer_of(row))]
        self._stream.write(self._separator + json.dumps(value, ensure_ascii=False).encode())
        self._separator = b",\n"

    def close(self) -> None:
        """End the array."""
        self._stream.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")


class OpenAiWriter:
    """Lines ``{"messages"}`` as OpenAI's fine-tuning takes them, and ours.

    Every content is a list of parts, so that tables of the lines have one type per column.
    """

    def __init__(self, stream: BinaryIO, asked: Asked) -> None:
        self._stream = stream
        self._asked = asked

    def add(self, row: ResultRow) -> None:
        """Write one row. Raises: LeftOut."""
        messages = [*self._asked.messages(row), answer_of(row)]
        value = {"messages": [self._message(row, message) for message in messages]}
        self._stream.write(_encoder.encode(value) + b"\n")

    def close(self) -> None:
        """Nothing is left to write."""

    def _message(self, row: ResultRow, message: Message) -> dict[str, Any]:
        content = message.content
        parts = [TextPart(content)] if isinstance(content, str) else content
        return {
            "role": message.role,
            "content": [
                part if isinstance(part, TextPart) else self._image(row, part) for part in parts
            ],
        }

    def _image(self, row: ResultRow, part: ImagePart) -> dict[str, Any]:
        url = self._asked.address(row, part.image_url.url)
        detail = {} if part.image_url.detail == "auto" else {"detail": part.image_url.detail}
        return {"type": "image_url", "image_url": {"url": url, **detail}}


def _turn(message: Message) -> dict[str, str]:
    """A turn as LLaVA writes it: the image's tag in front of the question that shows it."""
    text = text_of(message).strip()
    if IMAGE_TAG in text:
        raise LeftOut("image_tag", f"a text spells {IMAGE_TAG}, which stands for an image")
    if message.role == "assistant":
        return {"from": "gpt", "value": text}
    if images_of([message]):
        text = f"{IMAGE_TAG}\n{text}".rstrip()
    return {"from": "human", "value": text}
