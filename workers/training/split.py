"""Which rows are held out of training: by their image, so that none is on both sides. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def rank(seed: int, key: bytes) -> bytes:
    """Where a group of rows stands in the order of being held out; chance, but always the same."""
    return hashlib.sha256(b"%d\0%b" % (seed, key)).digest()


def target(rows: int, share: float, most: int) -> int:
    """How many rows to hold out: their share, at least one if any is asked for, at most half."""
    if share <= 0 or most <= 0:
        return 0
    return min(max(1, round(rows * share)), most, rows // 2)


def choose(groups: Iterable[tuple[bytes, int]], wanted: int) -> set[bytes]:
    """The keys of the groups to hold out.

    ``groups`` are (key, rows) in the order of their rank. One that would make it more than
    ``wanted`` rows is passed over, so the result may be fewer, and is none if all are larger.
    """
    chosen: set[bytes] = set()
    free = wanted
    for key, rows in groups:
        if rows <= free:
            chosen.add(key)
            free -= rows
        if not free:
            break
    return chosen
