"""The rows and images of a dataset while it is prepared, in a database file beside them.

Memory does not grow with the dataset. The file is scratch: it is not durable, and nobody but the
one process that made it reads it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec

from shared.errors import StorageFailed, StorageFull
from workers.training.data_report import Side
from workers.training.pictures import Picture
from workers.training.rows import Row
from workers.training.split import rank

_PAGE = 512

_SCHEMA = """
create table rows (
    id integer primary key, side text, number int, line int, content blob, image text
);
create table images (
    address text primary key, width int, height int, bytes int, name text, reason text, message text,
    exact int
);
create table good (
    id integer primary key, side text, key blob, tokens int, name text, held_out int default 0
);
create index by_name on good (name);
"""


class Fate(msgspec.Struct, frozen=True):
    """What became of an image: ``name`` if it is stored."""

    name: str | None
    exact: bool


class StoredRow(msgspec.Struct, frozen=True):
    """A row with where it came from and what is known of its image."""

    id: int
    side: Side
    number: int
    line: int
    row: Row
    picture: Picture | None
    problem: tuple[str, str] | None
    """Reason and message, if its image cannot be used."""


class GoodRow(msgspec.Struct, frozen=True):
    """A row that can be trained on."""

    side: Side
    number: int
    tokens: int
    row: Row
    picture: Picture | None


class RowTable:
    """Rows by number, images by address. Raises: StorageFull, StorageFailed."""

    def __init__(self, path: Path) -> None:
        self._base = scratch_database(path, _SCHEMA)
        self._path = path

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def add_row(self, side: Side, number: int, line: int, row: Row) -> None:
        """Keep a row, and its image as one to be found."""
        with scratch_errors(self._path):
            self._base.execute(
                "insert into rows (side, number, line, content, image) values (?, ?, ?, ?, ?)",
                (side, number, line, msgspec.msgpack.encode(row), row.image),
            )
        if row.image is not None:
            self.name_image(row.image)

    def name_image(self, address: str) -> None:
        """Keep an image as one to be found."""
        with scratch_errors(self._path):
            self._base.execute("insert or ignore into images (address) values (?)", (address,))

    def knows_image(self, address: str) -> bool:
        """Whether a row named the image."""
        with scratch_errors(self._path):
            found = self._base.execute("select 1 from images where address = ?", (address,))
            return found.fetchone() is not None

    def fate(self, address: str) -> Fate | None:
        """What is known of an image that a row named, if anything."""
        with scratch_errors(self._path):
            found = self._base.execute(
                "select name, exact from images"
                " where address = ? and (name is not null or reason is not null)",
                (address,),
            ).fetchone()
        return None if found is None else Fate(found[0], bool(found[1]))

    def found(self, address: str, picture: Picture, *, exact: bool = True) -> None:
        """An image is stored. ``exact``: it was found under the very name."""
        with scratch_errors(self._path):
            self._base.execute(
                "insert into images (address, width, height, bytes, name, exact)"
                " values (?, ?, ?, ?, ?, ?)"
                " on conflict (address) do update set width = excluded.width,"
                " height = excluded.height, bytes = excluded.bytes, name = excluded.name,"
                " exact = excluded.exact, reason = null, message = null",
                (address, picture.width, picture.height, picture.bytes, picture.name, exact),
            )

    def missed(self, address: str, reason: str, message: str, *, exact: bool = True) -> None:
        """An image cannot be used."""
        with scratch_errors(self._path):
            self._base.execute(
                "insert into images (address, reason, message, exact) values (?, ?, ?, ?)"
                " on conflict (address) do update set reason = excluded.reason,"
                " message = excluded.message, exact = excluded.exact, name = null",
                (address, reason, message, exact),
            )

    def wanted_images(self) -> Iterator[str]:
        """The addresses of images of which nothing is known yet; may be told meanwhile."""
        after = ""
        while True:
            with scratch_errors(self._path):
                page = self._base.execute(
                    "select address from images where address > ? and name is null"
                    " and reason is null order by address limit ?",
                    (after, _PAGE),
                ).fetchall()
            for (address,) in page:
                yield address
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def rows(self) -> Iterator[StoredRow]:
        """All rows in their order, with what is known of their images."""
        with scratch_errors(self._path):
            for id_, side, number, line, content, *image in self._base.execute(
                "select rows.id, side, number, line, content, name, width, height, bytes, reason,"
                " message from rows left join images on image = address order by rows.id"
            ):
                row = msgspec.msgpack.decode(content, type=Row)
                name, width, height, size, reason, message = image
                picture = None if name is None else Picture(name, width, height, size)
                problem = None if reason is None else (reason, message)
                yield StoredRow(id_, side, number, line, row, picture, problem)

    def keep(self, stored: StoredRow, key: bytes, tokens: int) -> None:
        """The row can be used."""
        name = None if stored.picture is None else stored.picture.name
        with scratch_errors(self._path):
            self._base.execute(
                "insert into good (id, side, key, tokens, name) values (?, ?, ?, ?, ?)",
                (stored.id, stored.side, key, tokens, name),
            )

    def drop_shared(self) -> list[tuple[int, int]]:
        """Take training rows whose image a validation row shows, too; their numbers and lines."""
        shared = (
            "from good where side = 'training' and key in"
            " (select key from good where side = 'validation')"
        )
        with scratch_errors(self._path):
            found = self._base.execute(
                f"select number, line from rows where id in (select id {shared})"  # noqa: S608
                " order by id"
            ).fetchall()
            self._base.execute(f"delete {shared}")
        return found

    def groups(self, seed: int) -> Iterator[tuple[bytes, int]]:
        """The keys of training rows with how many each has, in the order of their rank."""
        self._rank_by(seed)
        with scratch_errors(self._path):
            yield from self._base.execute(
                "select key, count(*) from good where side = 'training' group by key"
                " order by rank(key)"
            )

    def hold_out(self, keys: Iterable[bytes]) -> None:
        """Keep these groups of training rows, and all validation rows, from training."""
        with scratch_errors(self._path):
            self._base.execute("create index by_key on good (key)")
            self._base.execute("update good set held_out = 1 where side = 'validation'")
            self._base.executemany(
                "update good set held_out = 1 where key = ?", ((key,) for key in keys)
            )

    def train_rows(self) -> Iterator[GoodRow]:
        """The rows to train on, in their order."""
        return self._good_rows("held_out = 0 order by good.id")

    def held_out_rows(self, seed: int) -> Iterator[GoodRow]:
        """The rows kept from training, in the order of their rank, which is chance."""
        self._rank_by(seed)
        return self._good_rows("held_out = 1 order by rank(key), good.id")

    def _good_rows(self, which: str) -> Iterator[GoodRow]:
        with scratch_errors(self._path):
            # S608: `which` is one of the two texts above.
            for side, number, tokens, content, name, width, height, size in self._base.execute(
                "select good.side, number, tokens, content, good.name, width, height, bytes"  # noqa: S608
                " from good join rows on good.id = rows.id left join images on image = address"
                f" where {which}"
            ):
                row = msgspec.msgpack.decode(content, type=Row)
                picture = None if name is None else Picture(name, width, height, size)
                yield GoodRow(side, number, tokens, row, picture)

    def _rank_by(self, seed: int) -> None:
        with scratch_errors(self._path):
            self._base.create_function("rank", 1, lambda key: rank(seed, key), deterministic=True)

    def count(self, side: Side) -> int:
        """How many rows of a file can be used."""
        return self._number("select count(*) from good where side = ?", side)

    def text_only(self) -> int:
        """How many rows that can be used have no image."""
        return self._number("select count(*) from good where name is null")

    def train_tokens(self) -> int:
        """The tokens of all rows that are not held out."""
        return self._number("select coalesce(sum(tokens), 0) from good where held_out = 0")

    def tokens_at(self, share: float) -> int:
        """The number of tokens that ``share`` of the usable rows do not exceed."""
        rows = self._number("select count(*) from good")
        at = min(int(rows * share), rows - 1)
        return self._number("select tokens from good order by tokens limit 1 offset ?", max(at, 0))

    def images_used(self) -> tuple[int, int]:
        """How many different images usable rows show, and their bytes."""
        with scratch_errors(self._path):
            found = self._base.execute(
                "select count(*), coalesce(sum(bytes), 0) from"
                " (select name, max(bytes) as bytes from images"
                " where name in (select name from good) group by name)"
            ).fetchone()
        return int(found[0]), int(found[1])

    def uses(self, name: str) -> bool:
        """Whether a usable row shows the stored image of this name."""
        return self._number("select count(*) from good where name = ? limit 1", name) > 0

    def _number(self, query: str, *values: object) -> int:
        with scratch_errors(self._path):
            found = self._base.execute(query, values).fetchone()
        return 0 if found is None else int(found[0])


def scratch_database(path: Path, schema: str) -> sqlite3.Connection:
    """A new database that need not survive and that one thread uses.

    Raises: StorageFull, StorageFailed.
    """
    with scratch_errors(path):
        # Without locks, which some network file systems do not have: nobody else opens it.
        base = sqlite3.connect(f"file:{quote(str(path))}?nolock=1", uri=True, isolation_level=None)
        base.execute("pragma journal_mode = off")
        base.execute("pragma synchronous = off")
        base.executescript(schema)
        base.execute("begin")
    return base


@contextmanager
def scratch_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite raises below into StorageFull or StorageFailed."""
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFull(f"no space left for {path.name}; {StorageFull.__doc__}") from error
        raise StorageFailed(f"{path}: {error}") from error
