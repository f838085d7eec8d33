"""A line of a batch as a flat row: what was asked, what was answered, or why it failed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shared.captions import Place
from shared.chat import ImagePart, Message, TextPart


class Member(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where in an archive or a table (``place``) an image is.

    ``offset`` is where its bytes (tar) or its local header (zip) begin, or a row's number (table).
    ``size`` is the image's; ``stored`` is what a zip member takes.
    """

    place: Place
    offset: int
    size: int | None = None
    stored: int | None = None


class ResultRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a batch. Every key is always there, but the last two only if asked for.

    ``image`` is the address of the request's first image, or ``None`` if that is in the request
    itself or in an archive; ``prompt`` is the text of the last user message. Both are ``None`` too
    where the request cannot be read any more. ``caption`` is the answer, and ``None`` exactly if
    ``error_code`` is not. Of an image set, ``custom_id``, ``image`` and the URL in ``messages`` are
    escaped (``shared.captions.escape_name``).
    """

    line: int
    custom_id: str | None
    image: str | None
    prompt: str | None
    caption: str | None
    model: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    error_code: str | None
    error: str | None
    messages: list[Message] | msgspec.UnsetType | None = msgspec.UNSET
    member: Member | msgspec.UnsetType | None = msgspec.UNSET


def images_of(messages: Sequence[Message]) -> list[str]:
    """The addresses of all images that the messages show."""
    return [
        part.image_url.url
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def prompt_of(messages: Sequence[Message]) -> str | None:
    """The text of the last user message."""
    for message in reversed(messages):
        if message.role == "user":
            return text_of(message)
    return None


def text_of(message: Message) -> str:
    """The text of a message, its parts on lines of their own."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))
