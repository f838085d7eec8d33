"""What every format's writer has in common: it takes rows, and says which it leaves out and why."""

from __future__ import annotations

from collections import Counter
from typing import BinaryIO, Protocol

import msgspec

from shared.result_rows import ResultRow


class LeftOut(Exception):
    """A row that this format cannot hold, with a reason for programs and one for people."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(message)


class Report:
    """Counts the rows that are left out by reason, and lists them if there is where."""

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream
        self.left_out: Counter[str] = Counter()

    def leave_out(self, row: ResultRow, error: LeftOut) -> None:
        """Note a row. Raises: OSError."""
        self.left_out[error.reason] += 1
        if self._stream is not None:
            line = {
                "line": row.line,
                "custom_id": row.custom_id,
                "error_code": error.reason,
                "error": error.message,
            }
            self._stream.write(msgspec.json.encode(line) + b"\n")


class RowWriter(Protocol):
    """Writes rows of one format."""

    def add(self, row: ResultRow) -> None:
        """Write one row. Raises: LeftOut; click.ClickException if nothing more can be written."""
        ...

    def close(self) -> None:
        """Write what is still to be written, before the files are published."""
        ...
