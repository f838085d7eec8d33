"""The log files of a node's programs: kept small, and quoted when a program dies."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 16 * 1024 * 1024
"""A log larger than this becomes ``….log.1``, replacing the one before."""
_TAIL_BYTES = 16 * 1024
_NOT_TOLD = {"event", "level", "logger", "timestamp", "role", "pid", "exception"}


def log_path(folder: Path, program: str) -> Path:
    """The log file of ``program`` in ``folder``; the name is made safe."""
    return folder / f"{safe_name(program)}.log"


def safe_name(name: str) -> str:
    """``name`` as part of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".") or "unnamed"


def open_log(path: Path) -> BinaryIO:
    """Open for appending, rotated first if it has grown too large."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    rotate(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "wb")


def rotate(path: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Move a large log's content aside; writers that have it open go on from its start.

    Lines written during the copy may be lost. Returns whether anything was done: a disk too full
    for the copy leaves the log as it is, which cannot grow there either.
    """
    if not path.exists() or path.stat().st_size <= max_bytes:
        return False
    aside = path.with_name(path.name + ".1")
    try:
        shutil.copyfile(path, aside)
    except OSError:
        with suppress(OSError):  # there is no half copy, or it cannot be helped
            aside.unlink()
        return False
    os.truncate(path, 0)
    return True


def tail(path: Path, lines: int, *, since: int = 0) -> list[str]:
    """The last non-empty lines written after byte ``since``, at most ``lines``, for people."""
    if not path.exists():
        return []
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        start = max(since if since <= size else 0, size - _TAIL_BYTES)
        stream.seek(start)
        text = stream.read().decode(errors="replace")
    return [readable(line) for line in text.splitlines() if line.strip()][-lines:]


def readable(line: str) -> str:
    """A JSON log line as ``level: event key=value``, any other line as it is."""
    try:
        record = json.loads(line)
    except ValueError:
        return line.rstrip()
    if not isinstance(record, dict) or "event" not in record:
        return line.rstrip()
    told = [f"{key}={value}" for key, value in record.items() if key not in _NOT_TOLD]
    exception = str(record.get("exception", "")).strip().splitlines()
    text = " ".join([f"{record.get('level', 'info')}: {record['event']}", *told])
    return f"{text} ({exception[-1]})" if exception else text
