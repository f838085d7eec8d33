"""Columns of Parquet and Arrow files, a few rows at a time, and single rows by number.

Reads with pyarrow, which is the extra ``parquet``. Memory holds a few rows of
Parquet, or is that of the file itself for Arrow, which is mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from shared.captions import Place
from shared.errors import ConfigurationError, ImageSetUnreadable, ImageUnreadable

_ROWS = 64
_MAX_ROWS_PASSED = 1024
"""Rows that are rather passed over than looked for from the beginning."""
PARQUET, ARROW, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
"""What the files begin with. The hub of Hugging Face keeps Arrow as streams."""


class Table:
    """A table in an open file. Raises: ConfigurationError without pyarrow; ImageSetUnreadable."""

    def __init__(self, descriptor: int) -> None:
        arrow = _pyarrow()
        self._broken: tuple[type[Exception], ...] = (arrow.ArrowInvalid, arrow.ArrowException)
        try:
            if os.pread(descriptor, len(PARQUET), 0) == PARQUET:
                stream = os.fdopen(os.dup(descriptor), "rb")
                self._file: _Parquet | _Arrow = _Parquet(arrow.PythonFile(stream, mode="r"))
            else:
                # By its descriptor, for the path may name another file by now.
                self._file = _Arrow(arrow.memory_map(f"/proc/self/fd/{descriptor}"))
        except self._broken as error:
            raise ImageSetUnreadable(f"the table cannot be read: {error}") from None

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return self._file.columns

    def holds_bytes(self, column: str) -> bool:
        """Whether a column holds images themselves instead of paths."""
        arrow = _pyarrow()
        kind = self._file.type_of(column)
        if arrow.types.is_struct(kind):
            return True
        return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))

    def rows(self, columns: Sequence[str], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows from number ``start`` on, with these columns. Raises: ImageSetUnreadable."""
        try:
            yield from self._file.rows(list(columns), start)
        except self._broken as error:
            raise ImageSetUnreadable(f"the table is damaged: {error}") from None

    @property
    def length(self) -> int:
        """How many rows there are."""
        return self._file.length


class _Parquet:
    def __init__(self, stream: Any) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(stream, memory_map=False, pre_buffer=False)
        self.columns: list[str] = list(self._file.schema_arrow.names)
        self.length: int = self._file.metadata.num_rows

    def type_of(self, column: str) -> Any:
        return self._file.schema_arrow.field(column).type

    def rows(self, columns: list[str], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for group in range(self._file.metadata.num_row_groups):
            length = self._file.metadata.row_group(group).num_rows
            if number + length <= start:
                number += length
                continue
            batches = self._file.iter_batches(_ROWS, row_groups=[group], columns=columns)
            for batch in batches:
                if number + batch.num_rows > start:
                    yield from _rows_of(batch, number, start)
                number += batch.num_rows


class _Arrow:
    def __init__(self, mapped: Any) -> None:
        import pyarrow.ipc

        self._mapped = mapped
        self._is_stream: bool = mapped.read(len(ARROW)) != ARROW
        mapped.seek(0)
        schema = self._open(pyarrow.ipc).schema
        self.columns: list[str] = list(schema.names)
        self._types = {name: schema.field(name).type for name in schema.names}
        self.length: int = sum(batch.num_rows for batch in self._batches())

    def type_of(self, column: str) -> Any:
        return self._types[column]

    def rows(self, columns: list[str], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for batch in self._batches():
            if number + batch.num_rows > start:
                yield from _rows_of(batch.select(columns), number, start)
            number += batch.num_rows

    def _batches(self) -> Iterator[Any]:
        """The record batches, of which nothing is copied."""
        import pyarrow.ipc

        self._mapped.seek(0)
        found = self._open(pyarrow.ipc)
        if self._is_stream:
            yield from found
            return
        for index in range(found.num_record_batches):
            yield found.get_batch(index)

    def _open(self, ipc: Any) -> Any:
        return ipc.open_stream(self._mapped) if self._is_stream else ipc.open_file(self._mapped)


class TableRows:
    """The image column of a table from some row on; rows are asked for in their order."""

    def __init__(self, place: Place, descriptor: int, start: int) -> None:
        assert place.image_column is not None, "a table's place names its column"
        self._place = place
        self._column = place.image_column
        self._next = start
        self._rows = Table(descriptor).rows([self._column], start)

    def is_of(self, place: Place, number: int) -> bool:
        """Whether that row of that table can be had without beginning anew."""
        return place == self._place and self._next <= number < self._next + _MAX_ROWS_PASSED

    def cell(self, number: int) -> Any:
        """The value of the row. Raises: ImageSetUnreadable."""
        for found, values in self._rows:
            self._next = found + 1
            if found == number:
                return values[self._column]
        raise ImageSetUnreadable(f"the table has no row {number}")


def _rows_of(batch: Any, number: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    skipped = max(0, start - number)
    for at in range(skipped, batch.num_rows):
        yield number + at, {name: batch[name][at].as_py() for name in batch.schema.names}


def image_in(value: Any, name: str) -> bytes | str:
    """The image in a cell: bytes, a path, or a struct of both as the Hugging Face hub has them.

    Raises: ImageUnreadable.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | str) and value:
        return value
    raise ImageUnreadable(f"the row of {name} holds no image")


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise ConfigurationError(
            "tables (Parquet, Arrow) need the extra 'parquet' where they are read: "
            "pip install 'vlmq[parquet]'"
        ) from None
    return pa
