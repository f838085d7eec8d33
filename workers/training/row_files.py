"""Rows out of a file of JSON lines or one JSON array, one at a time, in bounded memory.

Knows where a row begins and ends, not what is in it: a row that is no valid JSON is given out as
it stands, and only a fault after which the next row cannot be found ends the reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared.errors import DatasetInvalid
from shared.storage import storage_errors
from workers.inference.batch_lines import BOM
from workers.inference.planning import read_lines

_BLOCK_BYTES = 1 << 20
_SOLID = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING_END = re.compile(rb'["\\]')
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class RawRow(msgspec.Struct, frozen=True):
    """The text of one row; empty if it is longer than allowed. Counted from 1."""

    number: int
    line: int
    text: bytes


def read_rows(path: Path, max_row_bytes: int, param: str) -> Iterator[RawRow]:
    """The rows of the file at ``path``, which ``param`` names in errors.

    Raises: DatasetInvalid where the file is neither, or its array is broken; StorageFailed.
    """
    with storage_errors(path), open(path, "rb", buffering=_BLOCK_BYTES) as stream:
        start = stream.read(4096)
        _require_text(start, param)
        stream.seek(0)
        solid = _SOLID.search(start.removeprefix(BOM))
        if solid is not None and solid[0] == b"[":
            yield from _array_rows(stream, max_row_bytes, param)
            return
        lines = read_lines(stream, max_row_bytes)
        for number, line in enumerate(lines, 1):
            yield RawRow(number, line.number, line.text)


def _require_text(start: bytes, param: str) -> None:
    if start.startswith(_COMPRESSED):
        raise DatasetInvalid(
            "the file is compressed or an archive; unpack it and upload the JSON or JSONL file "
            "itself (images go into 'images')",
            param=param,
        )
    if start.startswith(_UTF_16):
        raise DatasetInvalid("the file is UTF-16 text; save it as UTF-8", param=param)


def _array_rows(stream: BinaryIO, max_row_bytes: int, param: str) -> Iterator[RawRow]:
    splitter = _ArraySplitter(max_row_bytes, param)
    block = stream.read(_BLOCK_BYTES).removeprefix(BOM)
    while block:
        yield from splitter.feed(block)
        block = stream.read(_BLOCK_BYTES)
    splitter.finish()


class _ArraySplitter:
    """Finds the objects of a JSON array in blocks of its text."""

    def __init__(self, max_row_bytes: int, param: str) -> None:
        self._max_row_bytes = max_row_bytes
        self._param = param
        self._number = 0
        self._line = 1
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._opened = False
        self._closed = False
        self._may_end = True
        self._may_begin = False
        self._row = bytearray()
        self._row_line = 1
        self._is_too_long = False

    def feed(self, block: bytes) -> Iterator[RawRow]:
        at, begun, counted = 0, 0, 0
        while at < len(block):
            if not self._depth:
                solid = _SOLID.search(block, at)
                if solid is None:
                    break
                at = solid.end()
                if self._begins_row(solid[0]):
                    begun = at - 1
                    self._line += block.count(b"\n", counted, begun)
                    counted = begun
                    self._row_line = self._line
                continue
            at = self._inside(block, at)
            if not self._depth:
                self._keep(block, begun, at)
                yield self._taken()
        if self._depth:
            self._keep(block, begun, len(block))
        self._line += block.count(b"\n", counted)

    def finish(self) -> None:
        if not self._closed:
            raise self._broken("the array does not end; the file was probably not copied in full")

    def _begins_row(self, character: bytes) -> bool:
        """Whether a row begins; else it is what may stand around rows, in its place."""
        if self._closed:
            raise self._broken("something follows the end of the array")
        if character == b"[" and not self._opened:
            self._opened = self._may_begin = True
        elif character == b"," and not self._may_begin:
            self._may_begin, self._may_end = True, False
        elif character == b"]" and self._may_end:
            self._closed = True
        elif character == b"{" and self._may_begin:
            self._depth = 1
            self._number += 1
            self._may_begin, self._may_end = False, True
            return True
        else:
            raise self._broken("a row must be a JSON object, with a comma between two")
        return False

    def _inside(self, block: bytes, at: int) -> int:
        """Go on to the next place that matters within a row; returns where that ends."""
        if self._escaped:
            self._escaped = False
            return at + 1
        found = (_STRING_END if self._in_string else _STRUCTURE).search(block, at)
        if found is None:
            return len(block)
        character = found[0]
        if character == b'"':
            self._in_string = not self._in_string
        elif self._in_string:
            self._escaped = True
        else:
            self._depth += 1 if character in b"{[" else -1
        return found.end()

    def _keep(self, block: bytes, begun: int, end: int) -> None:
        if len(self._row) + end - begun > self._max_row_bytes:
            self._is_too_long = True
            self._row.clear()
        if not self._is_too_long:
            self._row += memoryview(block)[begun:end]

    def _taken(self) -> RawRow:
        row = RawRow(self._number, self._row_line, bytes(self._row))
        self._row.clear()
        self._is_too_long = False
        return row

    def _broken(self, what: str) -> DatasetInvalid:
        where = f"after row {self._number}" if self._number else "at its beginning"
        return DatasetInvalid(f"the JSON array is broken {where}: {what}", param=self._param)
