"""Parquet: the flat rows as a table, failed ones among them, a row group at a time in memory."""

from __future__ import annotations

from typing import Any, BinaryIO

import click

from shared.result_rows import ResultRow

_GROUP_ROWS = 5_000
_NOT_FLAT = ("messages", "member")
_NUMBERS = ("line", "prompt_tokens", "completion_tokens")


def require_pyarrow() -> Any:
    """The library. Raises: click.ClickException saying how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise click.ClickException(
            "Parquet needs pyarrow, which is not installed here; install it with: "
            "pip install 'vlmq[parquet]'"
        ) from None
    return pyarrow


class ParquetRows:
    """Writes a table to ``stream``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._arrow = require_pyarrow()
        fields = ResultRow.__struct_fields__
        text, number = self._arrow.string(), self._arrow.int64()
        self._schema = self._arrow.schema(
            [
                (name, number if name in _NUMBERS else text)
                for name in fields
                if name not in _NOT_FLAT
            ]
        )
        self._writer = self._arrow.parquet.ParquetWriter(stream, self._schema, compression="zstd")
        self._rows: list[ResultRow] = []

    def add(self, row: ResultRow) -> None:
        """Write one row."""
        self._rows.append(row)
        if len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the last rows and the table's end."""
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = [[getattr(row, name) for row in self._rows] for name in self._schema.names]
        arrays = [
            self._arrow.array(column, type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(self._arrow.table(arrays, schema=self._schema))
        self._rows.clear()
