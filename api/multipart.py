"""An upload form, read as it arrives: the file's bytes go on at once, nothing is kept.

Memory is bounded by two chunks of the body, whatever the client sends: headers, the text before
the first part and each field have limits of their own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Event, Field, File, MultipartDecoder, NeedData, State

from api.bodies import CHUNK_BYTES
from shared.errors import InvalidRequest, InvalidValue

FORM_OVERHEAD_BYTES = 1024 * 1024
"""How much a form may hold besides the file."""
_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 16
_MAX_BOUNDARY_CHARACTERS = 200
_MAX_FILENAME_BYTES = 255
_LINE_BREAK = re.compile(rb"[\r\n]")


class FormReader:
    """Reads one form: ``fields`` fill up, the file's pieces go to ``write``.

    Fields may come before or after the file. ``filename`` is made safe to show and to send in a
    header; it is never used as a path.
    """

    def __init__(self, write: Callable[[bytes], None], *, file_field: str = "file") -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._write = write
        self._file_field = file_field
        self._part: Field | File | None = None
        self._value = bytearray()

    def read(self, content_type: str, chunks: Iterator[bytes]) -> None:
        """Read the form to its end.

        Raises: UnsupportedMediaType, InvalidRequest, InvalidValue naming the part, and whatever
        ``write`` and ``chunks`` raise.
        """
        for event in _events(_boundary(content_type), chunks):
            if isinstance(event, Field | File):
                self._start(event)
            elif isinstance(event, Data):
                self._take(event)
        if self.filename is None:
            raise InvalidValue(
                f"the form has no file part '{self._file_field}'", param=self._file_field
            )

    def _start(self, part: Field | File) -> None:
        if not part.name:
            raise InvalidRequest("a part of the form has no name")
        if part.name == self._file_field:
            if not isinstance(part, File):
                raise InvalidValue(
                    f"'{part.name}' must be a file, with a filename", param=part.name
                )
            if self.filename is not None:
                raise InvalidValue("the form holds more than one file", param=part.name)
            self.filename = safe_filename(part.filename)
        elif isinstance(part, File) or part.name in self.fields:
            name = part.name[:64]
            raise InvalidValue(f"'{name}' must be one plain field", param=name)
        self._part = part
        self._value.clear()

    def _take(self, event: Data) -> None:
        part = self._part
        assert part is not None, "the decoder gives data only inside a part"
        if part.name == self._file_field:
            if event.data:
                self._write(event.data)
            return
        self._value += event.data
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidValue(f"'{part.name[:64]}' is too long", param=part.name[:64])
        if not event.more_data:
            try:
                self.fields[part.name] = self._value.decode()
            except UnicodeDecodeError:
                raise InvalidValue(f"'{part.name}' is not UTF-8", param=part.name) from None


def safe_filename(name: str) -> str:
    """The last part of a path in either system's style, without control characters, not too long.

    >>> safe_filename("../../etc/passwd")
    'passwd'
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join("_" if unicodedata.category(char)[0] == "C" else char for char in last).strip()
    if shown.strip(".") == "":
        return "upload"
    while len(shown.encode()) > _MAX_FILENAME_BYTES:
        shown = shown[:-1]
    return shown


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        raise UnsupportedMediaType("send the file as a form, with content-type multipart/form-data")
    boundary = options.get("boundary", "")
    if not 0 < len(boundary) <= _MAX_BOUNDARY_CHARACTERS or not boundary.isascii():
        raise InvalidRequest("the content-type needs a boundary of 1 to 200 ASCII characters")
    return boundary.encode()


def _events(boundary: bytes, chunks: Iterator[bytes]) -> Iterator[Event]:
    decoder = MultipartDecoder(boundary, max_form_memory_size=2 * CHUNK_BYTES, max_parts=_MAX_PARTS)
    for chunk in _cut_apart(boundary, chunks):
        # What follows the form is read, so that the connection stays usable, and dropped.
        if decoder.state is not State.EPILOGUE:
            yield from _decoded(decoder, chunk)
    if decoder.state is not State.EPILOGUE:
        raise InvalidRequest("the form ended before its closing boundary")


def _cut_apart(boundary: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, cut so that no boundary's line is ever split between two pieces.

    Werkzeug's decoder (3.1) takes the line break before a boundary for content when what it has
    ends inside that line, just behind the boundary: the stored file would grow by a byte.
    """
    longest_line = len(boundary) + 8
    held = b""
    for chunk in chunks:
        held += chunk
        start = _LINE_BREAK.search(held, max(0, len(held) - longest_line))
        cut = start.start() if start else len(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _decoded(decoder: MultipartDecoder, chunk: bytes) -> Iterator[Event]:
    try:
        decoder.receive_data(chunk)
    except RequestEntityTooLarge:
        raise InvalidRequest("the form has a part whose headers do not end") from None
    while decoder.state is not State.EPILOGUE:
        try:
            event = decoder.next_event()
        except RequestEntityTooLarge:
            raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts") from None
        except ValueError as error:
            raise InvalidRequest(f"the form cannot be read: {error}") from None
        if isinstance(event, NeedData):
            return
        yield event
