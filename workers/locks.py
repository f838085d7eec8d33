"""Locks that live as long as the processes that hold them, whatever kills those."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import BinaryIO

from shared.errors import ConfigurationError

_RETRY_S = 0.1


def exclusive(path: Path, refusal: str, *, wait_s: float = 0) -> BinaryIO:
    """Hold the lock file ``path`` until the returned file is closed or every holder is dead.

    A child that inherits the descriptor holds the lock too. ``wait_s`` gives a holder that was
    just killed the time to go.

    Raises: ConfigurationError with ``refusal`` and the holder's process id.
    """
    stream = open(path, "a+b")  # noqa: SIM115 - stays open for as long as the lock is held
    deadline = time.monotonic() + wait_s
    while not _locked(stream):
        if time.monotonic() >= deadline:
            stream.seek(0)
            holder = stream.read(32).decode(errors="replace").strip() or "unknown"
            stream.close()
            raise ConfigurationError(f"{refusal} (process {holder})")
        time.sleep(_RETRY_S)
    stream.truncate(0)
    stream.write(b"%d\n" % os.getpid())
    stream.flush()
    return stream


def _locked(stream: BinaryIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
