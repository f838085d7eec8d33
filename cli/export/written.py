"""What exports wrote below a folder: names and digests, so that a person's own file is told from ours.

The record is a SQLite database in the hidden folder ``.vlmq-captions``. A digest is entered before
its file gets its name, so a file of ours is never taken for somebody else's, whenever we are killed.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

FOLDER = ".vlmq-captions"
_SCHEMA = """
create table if not exists written (
    path blob not null, digest blob not null, run integer not null, primary key (path, digest)
) without rowid
"""


class Written:
    """The record of one folder, held by one export at a time; a context manager.

    ``scratch`` is a folder on the same disk for files that have no name yet.
    Raises: click.ClickException if another export holds it or it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / FOLDER / "written.sqlite"
        self.scratch = root / FOLDER / "part"
        self._run = secrets.randbits(62)
        with self._errors():
            (root / FOLDER).mkdir(mode=0o700, exist_ok=True)
            self._base = sqlite3.connect(self._path, timeout=0, isolation_level=None)
            try:
                self._base.execute("pragma locking_mode = exclusive")
                self._base.execute("begin exclusive")
                self._base.execute(_SCHEMA)
                self._base.execute("commit")
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.scratch.mkdir(mode=0o700)
            except BaseException:
                self._base.close()
                raise

    def close(self) -> None:
        """Let go of it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._base.close()

    def enter(self, files: Sequence[tuple[bytes, bytes]]) -> list[frozenset[bytes] | None]:
        """Note that these ``(path, digest)`` will be written now.

        Returns for each the digests under which it may be ours already, or ``None`` if this very
        export has written it before; that one is then not entered.
        """
        found: list[frozenset[bytes] | None] = []
        with self._transaction():
            for path, digest in files:
                rows = self._base.execute(
                    "select digest, run from written where path = ?", (path,)
                ).fetchall()
                if any(run == self._run for _, run in rows):
                    found.append(None)
                    continue
                found.append(frozenset(bytes(row[0]) for row in rows))
                self._base.execute(
                    "insert or replace into written values (?, ?, ?)", (path, digest, self._run)
                )
        return found

    def settle(
        self, ours: Sequence[tuple[bytes, bytes]], not_ours: Sequence[tuple[bytes, bytes]]
    ) -> None:
        """Forget earlier digests of files that are ``ours``, and entries that came to nothing."""
        with self._transaction():
            self._base.executemany("delete from written where path = ? and digest <> ?", ours)
            self._base.executemany("delete from written where path = ? and digest = ?", not_ours)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._base.execute("begin")
            try:
                yield
            except BaseException:
                self._base.execute("rollback")
                raise
            self._base.execute("commit")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise click.ClickException(
                    f"another export writes below {self._path.parent.parent} right now"
                ) from None
            raise click.ClickException(f"cannot write {self._path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise click.ClickException(
                f"{self._path} is damaged ({error}); delete it, then files that exports wrote count "
                "as your own and are kept unless --overwrite is given"
            ) from error
        except OSError as error:
            raise click.ClickException(f"cannot write {self._path}: {error.strerror}") from error
