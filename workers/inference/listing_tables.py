"""The images of a Parquet or Arrow file: one entry per row, by path or by the row's number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shared.captions import Entry, Place, escape_name
from shared.errors import ConfigurationError, ImageSetUnreadable, ImageUnreadable
from shared.tables import Table, image_in
from workers.inference.entry_images import as_text, texts_of
from workers.inference.listing_archives import opened
from workers.inference.listing_base import Found, Surroundings
from workers.inference.listing_lists import IMAGE_COLUMNS, path_entry

_TICK_EVERY = 256


def list_rows(
    place: Place, name_column: str | None, after: object, around: Surroundings
) -> Iterator[Found]:
    """The images of the rows, in their order. A cursor is the number of the next row.

    ``place`` names its column of images, if somebody said which that is.
    Raises: ImageSetUnreadable if there is no such column, or nothing here reads tables.
    """
    start = 0 if after is None else int(str(after))
    with opened(place, around) as stream:
        try:
            table = Table(stream.fileno())
        except ConfigurationError as error:
            raise ImageSetUnreadable(error.message) from None
        column = _image_column(table, place.image_column)
        wanted = [column] if not table.holds_bytes(column) else []
        wanted += [name for name in (name_column, *around.columns) if name in table.columns]
        _require(table, name_column)
        place = Place(
            place.type,
            path=place.path,
            file=place.file,
            prefix=place.prefix,
            size=place.size,
            mtime_ns=place.mtime_ns,
            image_column=column,
        )
        for number, values in table.rows(list(dict.fromkeys(wanted)), start):
            if number % _TICK_EVERY == 0:
                around.keep_going()
            entry = _entry(number, values, place, column, name_column, around)
            yield Found(entry, place, number + 1)


def _image_column(table: Table, asked: str | None) -> str:
    if asked is not None:
        _require(table, asked)
        return asked
    found = next((name for name in IMAGE_COLUMNS if name in table.columns), None)
    if found is None:
        raise ImageSetUnreadable(
            f"the table has no column called {' or '.join(IMAGE_COLUMNS)}; say in 'image_column' "
            f"which of {', '.join(table.columns[:20])} has the images"
        )
    return found


def _require(table: Table, column: str | None) -> None:
    if column is not None and column not in table.columns:
        raise ImageSetUnreadable(
            f"the table has no column '{column}'; it has {', '.join(table.columns[:20])}"
        )


def _entry(
    number: int,
    values: dict[str, Any],
    place: Place,
    column: str,
    name_column: str | None,
    around: Surroundings,
) -> Entry:
    texts = texts_of(values, around.columns)
    name = as_text(values.get(name_column)) if name_column else None
    if column not in values:
        own_name = place.prefix + escape_name(name or f"{number:08d}")
        return Entry(own_name, offset=number, texts=texts or None)
    try:
        path = image_in(values[column], f"row {number}")
        if not isinstance(path, str):
            raise ImageUnreadable(f"row {number} holds no path")
    except ImageUnreadable as error:
        own_name = place.prefix + escape_name(name or f"row {number}")
        return Entry(own_name, refused=(error.code, error.message))
    return path_entry(path, escape_name(name or path), place, texts)
