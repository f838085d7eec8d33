"""The names in a folder in their order, however many there are.

They are sorted in runs that are written to disk once there are more than fit in memory, and merged as
they are read back.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.storage import storage_errors

RUN_NAMES = 100_000
_TICK_EVERY = 4096
_BLOCK_BYTES = 1 << 16
_NUL = "\0"


def sorted_names(
    descriptor: int,
    wanted: Callable[[os.DirEntry[str]], str | None],
    scratch: Path,
    keep_going: Callable[[], None],
) -> Iterator[tuple[str, str]]:
    """Names in the folder with the mark that ``wanted`` gives each; those it gives none are left out.

    A mark is one character. Raises: OSError if the folder cannot be read; StorageFull.
    """
    runs: list[Path] = []
    names: list[str] = []
    with os.scandir(descriptor) as entries:
        for count, entry in enumerate(entries):
            if count % _TICK_EVERY == 0:
                keep_going()
            mark = wanted(entry)
            if mark is not None:
                # No name holds a NUL, so a name comes before whatever is longer, as it should.
                names.append(f"{entry.name}{_NUL}{mark}")
                if len(names) >= RUN_NAMES:
                    runs.append(_spill(names, scratch))
                    names = []
    names.sort()
    rows = heapq.merge(*map(_read, runs), names) if runs else iter(names)
    for row in rows:
        yield row[:-2], row[-1]
    for run in runs:
        run.unlink(missing_ok=True)


def _spill(names: list[str], scratch: Path) -> Path:
    names.sort()
    path = scratch / f"names-{os.urandom(8).hex()}"
    with storage_errors(path), open(path, "xb") as stream:
        stream.writelines(name.encode("utf-8", "surrogateescape") + b"\0" for name in names)
    return path


def _read(path: Path) -> Iterator[str]:
    """The rows of a run: each is a name, a NUL, a mark and a NUL."""
    rest = b""
    with storage_errors(path), open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            *parts, rest = (rest + block).split(b"\0")
            if len(parts) % 2:
                rest = parts.pop() + b"\0" + rest
            for name, mark in zip(parts[::2], parts[1::2], strict=True):
                yield f"{name.decode('utf-8', 'surrogateescape')}{_NUL}{mark.decode()}"
