"""Image sets: what a caption job was asked, and the entries that its listing writes.

A caption job is a batch with a :class:`CaptionSource` in place of an input file. Its listing writes
one :class:`Entry` per image; ``custom_id`` of a result line is the entry's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from shared.chat import ChatRequest, GenerationParameters, ImagePart, ImageUrl, Message, TextPart
from shared.errors import InvalidValue, TextMissing, VlmqError, from_code
from shared.quality import QualityGate

PlaceType = Literal["folder", "glob", "list", "tar", "zip", "table", "image"]

ENTRY_URL = "entry:"
"""What stands in a request where the URL of an image would; the entry says where the image is."""
MAX_PLACES = 1000
MAX_SAMPLE = 64
"""Images of a pre-flight."""
MAX_TEXT = 100_000
"""Characters of a prompt or template, and of each text that is put into one."""


class ImagePlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where images of a set are: a ``path`` of the server, or the id of an uploaded ``file``.

    Without ``type`` it is told from what is there. ``image_column`` and ``name_column`` are for tables
    and lists of JSON objects.
    """

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None = None
    file: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    type: PlaceType | None = None
    image_column: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    name_column: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Only so many images of the set, chosen by ``seed``: a pre-flight."""

    images: Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLE)] = MAX_SAMPLE
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


class Sync(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """That a set is captioned again and again, each time only what is new or changed.

    ``name`` is what the set is called, wherever its images are; without it the places are the set.
    ``rehash``: read every file, also those whose size and time are as before. ``only_new``: no lines for
    images that have their captions under their present names.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    rehash: bool = False
    only_new: bool = False


class SyncPlan(msgspec.Struct, frozen=True):
    """What a listing makes of a :class:`Sync`.

    ``generation`` is the number of what the set's index will learn from it, ``model`` the
    fingerprint of the model that is asked. Entries so far: ``known`` have captions from before,
    ``duplicates`` are the same as an earlier one, ``passed`` are left out.
    """

    generation: int
    model: str
    known: int = 0
    duplicates: int = 0
    passed: int = 0


class CaptionSource(GenerationParameters, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """An image set, and what is asked about each image of it.

    Exactly one of ``prompt``, which is taken as it is, and ``template`` is given.
    """

    images: list[ImagePlace]
    model: str
    prompt: str | None = None
    template: str | None = None
    system: str | None = None
    detail: Literal["auto", "low", "high"] = "auto"
    quality: QualityGate | None = None
    sample: Sample | None = None
    sync: Sync | None = None

    @property
    def file_ids(self) -> list[str]:
        """The uploads that are read."""
        return [place.file for place in self.images if place.file is not None]

    @property
    def asked(self) -> Template:
        """The template, or the prompt as one without columns."""
        if self.template is not None:
            return Template(self.template)
        return Template((self.prompt or "").replace("{", "{{").replace("}", "}}"))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns and sidecars whose texts the template needs."""
        return () if self.template is None else Template(self.template).columns


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image of a set; a line of the manifest. The reader checks all of it again.

    ``name`` is unique in the batch. ``place`` is where its :class:`Place` begins in the file of
    places. ``path`` is given where it does not follow from place and name. ``offset`` is where a
    member's bytes (tar) or its local header (zip) begin, or a row's number (table). ``size`` and
    ``mtime_ns`` are those of the file, or the size of the member's image. ``stored`` is what a zip
    member takes in the archive. ``texts`` are the columns' values; ``sidecars`` say where texts are:
    offset and size, and for zip what they take in the archive.
    ``refused`` is a code and a message: the image cannot be used.

    Only in a sync: ``content`` is the SHA-256 of the image's bytes in hexadecimal; ``known`` says that
    the set's index has a caption for it, ``same_as`` is the number of the first line that is asked the same
    about the same bytes. ``noted`` says that the index has size and time already; ``young``, that they are
    too recent to tell a later change by.
    """

    name: str
    place: int = 0
    path: str | None = None
    offset: int | None = None
    size: int | None = None
    mtime_ns: int | None = None
    stored: int | None = None
    texts: dict[str, str] | None = None
    sidecars: dict[str, list[int]] | None = None
    refused: tuple[str, str] | None = None
    content: str | None = None
    known: bool = False
    same_as: int | None = None
    noted: bool = False
    young: bool = False

    def error(self) -> VlmqError | None:
        """Why the image cannot be used, if that was clear when the set was listed."""
        return None if self.refused is None else from_code(*self.refused)


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where entries are: below a folder (``path``), or in an archive or table.

    ``prefix`` is what their names begin with beside their path in it. ``file`` is the id of an upload,
    which then is what ``path`` would be. ``size`` and ``mtime_ns`` are of an archive when it was listed.
    """

    type: PlaceType
    path: str | None = None
    file: str | None = None
    prefix: str = ""
    size: int | None = None
    mtime_ns: int | None = None
    image_column: str | None = None


_entry = msgspec.json.Decoder(Entry)
_place = msgspec.json.Decoder(Place)


def decode_entry(line: bytes) -> Entry:
    """The entry of a manifest's line. Raises: msgspec.DecodeError if it is damaged."""
    return _entry.decode(line)


def decode_place(line: bytes) -> Place:
    """The place of a line of the file of places. Raises: msgspec.DecodeError if it is damaged."""
    return _place.decode(line)


# --- names ------------------------------------------------------------------------------------

_UNSAFE = re.compile(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


def escape_name(name: str) -> str:
    """A file's name as text that is valid Unicode; different names stay different.

    ``name`` is as Python decodes file names: bytes that are no UTF-8 are lone surrogates.
    """
    if name.isascii() and "\\" not in name:
        return name
    return _UNSAFE.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character == "\\":
        return r"\x5c"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def unescape_name(name: str) -> str:
    """What :func:`escape_name` was given."""
    if "\\" not in name:
        return name
    raw = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), name.encode())
    return raw.decode("utf-8", "surrogateescape")


# --- prompts ----------------------------------------------------------------------------------

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]{1,256})\}|[{}]")


class Template:
    """A prompt with ``{columns}``; ``{{`` and ``}}`` stand for braces.

    Raises: InvalidValue for ``template``.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[str] = []
        """Text and names of columns in turn."""
        plain, at = "", 0
        for match in _TOKEN.finditer(text):
            plain += text[at : match.start()]
            at = match.end()
            if match[1] is not None:
                self._parts += [plain, match[1]]
                plain = ""
            elif match[0] in ("{{", "}}"):
                plain += match[0][0]
            else:
                raise InvalidValue(
                    f"the '{match[0]}' at character {match.start() + 1} of the template belongs to "
                    "no {column}; write {{ and }} for braces",
                    param="template",
                )
        self._parts.append(plain + text[at:])

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, each once."""
        return tuple(dict.fromkeys(self._parts[1::2]))

    def fill(self, texts: Mapping[str, str]) -> str:
        """The prompt with these texts. Raises: TextMissing naming the first that is not there."""
        parts = self._parts.copy()
        for index in range(1, len(parts), 2):
            text = texts.get(parts[index])
            if text is None:
                raise TextMissing(
                    f"the template needs {{{parts[index]}}}, and this image has no such text",
                    param="template",
                )
            if len(text) > MAX_TEXT:
                raise TextMissing(
                    f"the text for {{{parts[index]}}} has {len(text):,} characters; at most "
                    f"{MAX_TEXT:,} are put into a prompt",
                    param="template",
                )
            parts[index] = text
        return "".join(parts)


def request_of(source: CaptionSource, prompt: str) -> ChatRequest:
    """The chat request about one image; its URL stands for whatever the entry names."""
    parts: list[TextPart | ImagePart] = [ImagePart(ImageUrl(ENTRY_URL, source.detail))]
    if prompt:
        parts.append(TextPart(prompt))
    messages = [Message("user", parts)]
    if source.system is not None:
        messages.insert(0, Message("system", source.system))
    return ChatRequest(model=source.model, messages=messages, **parameters_of(source))


def parameters_of(source: GenerationParameters) -> dict[str, Any]:
    """The generation parameters that were given."""
    fields = GenerationParameters.__struct_fields__
    values = ((name, getattr(source, name)) for name in fields)
    return {name: value for name, value in values if value is not None}


def unique_labels(labels: Sequence[str]) -> list[str]:
    """The labels of several places, each made different from those before it."""
    found: list[str] = []
    for label in labels:
        number, candidate = 2, label
        while candidate in found:
            candidate, number = f"{label}-{number}", number + 1
        found.append(candidate)
    return found
