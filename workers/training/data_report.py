"""What was found in the data of a fine-tune: ``report.json`` of its ``data`` folder."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from shared.errors import RowUnusable
from shared.finetunes import DataFormat

SHOWN_ROWS = 20
SHOWN_ENTRIES = 20

Side = Literal["training", "validation"]


class BadRow(msgspec.Struct, frozen=True, order=True):
    """A row that was dropped. ``row`` and ``line`` count from 1 within its file."""

    file: Side
    row: int
    line: int
    reason: str
    message: str
    field: str | None = None


class RefusedEntry(msgspec.Struct, frozen=True):
    """A member of an archive that was passed over for what it is."""

    name: str
    reason: str


class Spread(msgspec.Struct, frozen=True):
    """Tokens per usable row, image and template included."""

    p50: int = 0
    p95: int = 0
    max: int = 0


class DataReport(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of rows and images by fate.

    ``rows`` is ``usable`` plus all of ``dropped``; ``usable`` is ``train`` plus ``held_out``.
    ``notes`` counts rows that are used, but not quite as they were written. ``images`` are those
    used, each once however many rows show it; ``image_bytes`` is what they take. ``bytes`` and
    ``sha256`` are of both files of rows, where images stand under the digest of their content.
    """

    format: DataFormat
    rows: int = 0
    usable: int = 0
    train: int = 0
    held_out: int = 0
    text_only: int = 0
    dropped: dict[str, int] = {}
    bad_rows: list[BadRow] = []
    notes: dict[str, int] = {}
    refused_entries: dict[str, int] = {}
    first_refused_entries: list[RefusedEntry] = []
    images: int = 0
    image_bytes: int = 0
    tokens: Spread = Spread()
    train_tokens: int = 0
    """Of all rows for training together, seen once."""
    exact_tokens: bool = False
    """Whether tokens were counted with the base's tokenizer; else they are upper bounds."""
    max_length: int = 0
    bytes: int = 0
    sha256: str = ""


class Tally:
    """Counts rows by fate while they pass; remembers only the first bad ones."""

    def __init__(self) -> None:
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self._first: list[BadRow] = []

    @property
    def bad(self) -> int:
        """How many rows were dropped so far."""
        return self.dropped.total()

    def drop(self, file: Side, row: int, line: int, problem: RowUnusable) -> None:
        """Count a row that cannot be used, and remember it if it is among the first."""
        self.dropped[problem.reason] += 1
        if len(self._first) < SHOWN_ROWS or (file, row) < (
            self._first[-1].file,
            self._first[-1].row,
        ):
            found = BadRow(file, row, line, problem.reason, problem.message, problem.param)
            self._first = sorted([*self._first, found])[:SHOWN_ROWS]

    @property
    def first(self) -> list[BadRow]:
        """The first bad rows, in the order of their files."""
        return list(self._first)


class EntryTally:
    """Counts the members of an archive that were refused; remembers the first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[RefusedEntry] = []

    def refuse(self, name: str, reason: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        if len(self.first) < SHOWN_ENTRIES:
            self.first.append(RefusedEntry(name, reason))
