"""Uploads with a progress bar, of files and of folders packed into one."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cli.client import Client, Json
from cli.output import amount, err, note


def upload(client: Client, file: Path, purpose: str) -> Json:
    """Upload a file and say under which id. Raises: ServerTrouble, click.ClickException."""
    columns = (
        TextColumn("upload"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        size = file.stat().st_size
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("upload", total=size)
            uploaded = client.upload(file, purpose, lambda read: bar.advance(task, read))
    except OSError as error:
        raise click.ClickException(f"cannot read {file}: {error.strerror or error}") from None
    note(f"uploaded {file.name} as {uploaded['id']}")
    return uploaded


@contextmanager
def packed(folder: Path) -> Iterator[Path]:
    """A tar of every file below ``folder``, by its path in it, for as long as the block lasts.

    Hidden files are left out; links to files are packed as the files. It takes as much room below
    the system's temporary folder as the files themselves.
    Raises: click.ClickException when nothing is there or it cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix="vlmq-pack-") as place:
        archive = Path(place) / f"{folder.resolve().name or 'images'}.tar"
        try:
            count = _pack(folder, archive)
            size = archive.stat().st_size
        except OSError as error:
            raise click.ClickException(f"cannot pack {folder}: {error}") from None
        if not count:
            raise click.ClickException(f"{folder} holds no files")
        note(f"packed the {count:,} files of {folder} into {amount(size)}")
        yield archive


def _pack(folder: Path, archive: Path) -> int:
    count = 0
    with tarfile.open(archive, "w", dereference=True) as tar:
        for path in _files(folder):
            tar.add(path, arcname=str(path.relative_to(folder)), recursive=False)
            count += 1
    return count


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and path.is_file():
                yield path
