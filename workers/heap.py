"""The C library's heap in processes that make and drop megabytes of pixels all the time."""

from __future__ import annotations

import ctypes

_MIB = 1024 * 1024
# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BYTES = 32 * _MIB
"""The most that glibc lets be asked for; larger pieces are given back one by one."""
_KEPT_BYTES = 64 * _MIB


def keep_freed_memory() -> None:
    """Let this process keep up to 64 MiB that it has freed, for what it asks for next.

    glibc gives the memory of tiles and frames back at once otherwise, and every page of the next ones
    is a fault and has to be cleared: a sixth of the time of a 448 px tile. Elsewhere than with glibc
    nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
