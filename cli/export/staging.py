"""Files that appear whole, durable and under their names, or not at all.

They are made in a hidden folder beside, ``.NAME.part``, which the next export to the same place takes
over if this one is killed. What is there already is kept unless the person says otherwise.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` below into a ClickException that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def write_failure(path: Path, error: OSError) -> click.ClickException:
    """What to tell a person whose ``path`` cannot be written."""
    is_full = error.errno in _FULL
    advice = "; nothing under its name is half: free some space and export again" if is_full else ""
    return click.ClickException(f"cannot write {path}: {error.strerror or error}{advice}")


class Staging:
    """The folder in which an export is made; see :func:`staged`."""

    def __init__(self, folder: Path, target: Path, *, overwrite: bool) -> None:
        self._folder = folder
        self._target = target
        self._overwrite = overwrite
        self._names: list[str] = []

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A new file, to be published as ``name``; durable when the block ends.

        Raises: click.ClickException if something is there already or it cannot be written.
        """
        final = self._target / name
        if not self._overwrite or final.is_dir():
            refuse_existing(final)
        with write_errors(final), open(self._folder / name, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        self._names.append(name)

    def publish(self) -> None:
        """Give the files their names."""
        with write_errors(self._target):
            folder = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in self._names:
                final = self._target / name
                with write_errors(final):
                    try:
                        move_into(self._folder / name, folder, name, overwrite=self._overwrite)
                    except FileExistsError:
                        refuse_existing(final)
                        raise
            with write_errors(self._target):
                os.fsync(folder)
        finally:
            os.close(folder)


def refuse_existing(path: Path) -> None:
    """Raise ClickException if something is at ``path``, be it a broken link."""
    if path.is_dir():
        raise click.ClickException(f"{path} is a folder; name a file in it")
    if os.path.lexists(path):
        raise click.ClickException(f"{path} exists; --overwrite replaces it")


def move_into(source: str | Path, folder: int, name: str | bytes, *, overwrite: bool) -> None:
    """Give a finished file its name in an open folder.

    Raises: FileExistsError unless it may ``overwrite``; OSError.
    """
    try:
        if overwrite:
            os.rename(source, name, dst_dir_fd=folder)
        else:
            # Unlike a rename, a link does not replace what somebody put there meanwhile.
            os.link(source, name, dst_dir_fd=folder)
            os.unlink(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy_into(source, folder, name, overwrite=overwrite)


def _copy_into(source: str | Path, folder: int, name: str | bytes, *, overwrite: bool) -> None:
    """The same where the disk has no links, or is another one."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    beside = f".vlmq-{secrets.token_hex(8)}.part"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
    try:
        with open(source, "rb") as old, open(descriptor, "wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
        os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(beside, dir_fd=folder)
        raise
    os.unlink(source)


@contextmanager
def staged(target: Path, name: str, *, overwrite: bool) -> Iterator[Staging]:
    """A staging for files in the folder ``target``, published if the block ends without an error.

    Raises: click.ClickException, also if another export of this name is at work.
    """
    folder = target / f".{name}.part"
    with write_errors(target / name):
        lock = _locked(folder, target / name)
    try:
        with write_errors(target / name):
            _empty(folder)
        staging = Staging(folder, target, overwrite=overwrite)
        yield staging
        staging.publish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path, final: Path) -> int:
    """Make the folder and hold it, as long as the descriptor is open."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise click.ClickException(f"another export writes {final} right now") from None
        except OSError:
            # A file system without such locks; all but two exports at once are as safe.
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # the export that held it has just ended
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        os.unlink(entry.path)
