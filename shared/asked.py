"""What each line of a batch asked: read from its input file, or from the manifest of its image set."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from shared.captions import (
    CaptionSource,
    Entry,
    Place,
    Template,
    decode_entry,
    decode_place,
    request_of,
)
from shared.chat import ImagePart, ImageUrl, Message
from shared.errors import StorageFailed, TextMissing
from shared.manifest import Chunk, Manifest
from shared.result_rows import Member, images_of, prompt_of
from shared.storage import storage_errors

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_BOM = b"\xef\xbb\xbf"


class Asked(msgspec.Struct, frozen=True):
    """One request, as the fields of a :class:`~shared.result_rows.ResultRow` of these names."""

    messages: list[Message] | None = None
    image: str | None = None
    prompt: str | None = None
    member: Member | None = None


class BatchInput(Protocol):
    """The requests of a batch."""

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """The lines of a chunk by number, one at a time. Raises: StorageFailed."""
        ...

    def asked(self, chunk: Chunk, text: bytes) -> Asked:
        """The request of a line of the chunk. Raises: StorageFailed."""
        ...


class NoInput:
    """Of a file that was deleted nothing is known."""

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """Nothing."""
        return iter(())

    def asked(self, chunk: Chunk, text: bytes) -> Asked:
        """Nothing."""
        return Asked()


# --- a JSONL file -----------------------------------------------------------------------------


class _Body(msgspec.Struct, frozen=True):
    messages: list[Message]


class _InputLine(msgspec.Struct, frozen=True):
    body: _Body


_input = msgspec.json.Decoder(_InputLine)


class FileInput:
    """The lines of a JSONL file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """Read them."""
        return _lines(self._path, chunk)

    def asked(self, chunk: Chunk, text: bytes) -> Asked:
        """The request, or nothing if it cannot be read, which then is why the line failed."""
        try:
            messages = _input.decode(text.removeprefix(_BOM)).body.messages
        except UNREADABLE:
            return Asked()
        urls = images_of(messages)
        image = urls[0] if urls and urls[0][:5].lower() != "data:" else None
        return Asked(messages, image, prompt_of(messages))


def _lines(path: Path, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    with storage_errors(path), open(path, "rb") as stream:
        stream.seek(chunk.offset)
        left, number = chunk.length, chunk.first_line
        while left:
            text = stream.readline(left)
            if not text:
                raise StorageFailed(f"{path} is shorter than when the batch was planned")
            left -= len(text)
            yield number, text
            number += 1


# --- an image set -----------------------------------------------------------------------------


class SetInput:
    """The entries of an image set. Names and paths are escaped as ``shared.captions`` does."""

    def __init__(self, source: CaptionSource, manifest: Manifest) -> None:
        self._source = source
        self._template: Template = source.asked
        self._manifest = manifest
        self._places: dict[tuple[Path, int], Place] = {}

    def lines(self, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
        """Read them."""
        return _lines(self._manifest.entries(chunk.index), chunk)

    def asked(self, chunk: Chunk, text: bytes) -> Asked:
        """The request; its image's URL is the name in the set.

        ``prompt`` is ``None``, and no text is in the messages, if it was made with texts that are
        not in the manifest (sidecar files).
        """
        try:
            entry = decode_entry(text)
        except UNREADABLE as error:
            raise StorageFailed(f"the manifest of the image set is damaged: {error}") from error
        place = self._place(self._manifest.places(chunk.index), entry.place)
        try:
            prompt = self._template.fill(entry.texts or {})
        except TextMissing:
            prompt = None
        messages = request_of(self._source, prompt or "").messages
        return Asked(
            [_named(message, entry.name) for message in messages],
            _path(entry, place),
            prompt,
            _member(entry, place),
        )

    def _place(self, path: Path, offset: int) -> Place:
        found = self._places.get((path, offset))
        if found is None:
            with storage_errors(path), open(path, "rb") as stream:
                stream.seek(offset)
                line = stream.readline()
            try:
                found = decode_place(line)
            except UNREADABLE as error:
                raise StorageFailed(f"{path} is damaged at byte {offset}: {error}") from None
            self._places = {(path, offset): found}
        return found


def _named(message: Message, name: str) -> Message:
    if isinstance(message.content, str):
        return message
    parts = [
        ImagePart(ImageUrl(name, part.image_url.detail)) if isinstance(part, ImagePart) else part
        for part in message.content
    ]
    return msgspec.structs.replace(message, content=parts)


def _path(entry: Entry, place: Place) -> str | None:
    """The address of an image that is a file of its own; escaped."""
    if entry.path is not None:
        return entry.path
    if place.type == "image":
        return place.path or place.file
    if place.type != "folder" or place.path is None:
        return None
    return posixpath.join(place.path, entry.name.removeprefix(place.prefix))


def _member(entry: Entry, place: Place) -> Member | None:
    """Where in an archive or a table the image is."""
    if entry.offset is None or entry.path is not None:
        return None
    return Member(place, entry.offset, entry.size, entry.stored)
