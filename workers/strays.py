"""Processes that an earlier run of a node left behind, found by a mark in their environment."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from shared.process import parent_of

MARK = "VLMQ_RUN_DIR"
"""Every program that a node starts has its run_dir in this environment variable."""


def find_strays(value: object, mark: str = MARK) -> list[int]:
    """The ids of this user's processes with ``mark=value`` in their environment.

    This one and its ancestors are left out. Only Linux can tell; elsewhere there are none to be
    seen.
    """
    if not sys.platform.startswith("linux"):
        return []
    entry_of_mark = f"{mark}={value}".encode()
    spared = _ancestors()
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and int(entry.name) not in spared and _carries(entry, entry_of_mark)
    ]


def end_strays(value: object, mark: str = MARK, *, wait_s: float = 5) -> list[int]:
    """Kill them all and wait until they are gone; returns those that were found."""
    found: list[int] = []
    deadline = time.monotonic() + wait_s
    while strays := find_strays(value, mark):
        for pid in strays:
            _kill(pid)
        found.extend(pid for pid in strays if pid not in found)
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return found


def _carries(process: Path, mark: bytes) -> bool:
    try:
        return mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        # Gone meanwhile, or somebody else's.
        return False


def _ancestors() -> set[int]:
    pids: set[int] = set()
    pid = os.getpid()
    while pid > 0:
        pids.add(pid)
        pid = parent_of(pid)
    return pids


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
