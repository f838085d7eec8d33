"""What commands print: tables and progress for people, JSON for programs.

Results go to standard output, everything said about them to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 400
"""Tables may be as wide as this; terminals wrap what does not fit."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print structs, lists and dictionaries as indented JSON."""
    click.echo(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print rows under their columns, or the sentence ``empty``."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Ids and paths stay whole, to be copied, even if the terminal is narrower.
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    if table.row_count:
        Console(highlight=False, width=max(out.width, WIDEST)).print(table)
    else:
        note(empty)


def note(text: str) -> None:
    """Say something to the person, apart from the result."""
    err.print(Text(text))


def note_older(page: dict[str, Any], command: str) -> None:
    """Say how to see what comes after a page, if anything does; ``command`` made this one."""
    if page["has_more"]:
        note(f"older ones: {command} --after {page['data'][-1]['id']}")


def amount(size_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.2f} GiB"
    return f"{size_bytes / 2**20:.2f} MiB"


def when(unix_s: float | None) -> str:
    """A Unix time in the local time zone, or a dash."""
    if unix_s is None:
        return "-"
    return datetime.fromtimestamp(unix_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
