"""Which rows are held out of training: by their image, so that none is on both sides. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def rank(seed: int, key: bytes) -> bytes:
    """Where a group of rows stands in the order of being held out; chance, but always the same."""
    return hashlib.sha256(b"%d\0%b" % (seed, key)).digest()


def target(rows: int, share: float) -> int:
    """How many rows to hold out: their share, at least one if any is asked for, at most half."""
    return min(max(1, round(rows * share)), rows // 2) if share > 0 else 0


def choose(groups: Iterable[tuple[bytes, int]], wanted: int, most: int) -> set[bytes]:
    """The keys of the groups to hold out, of ``wanted`` rows and of ``most`` if they can be.

    ``groups`` are (key, rows) in the order of their rank. One that would make it more rows than
    both allow is passed over, so the result may be fewer. If every group has more than ``most`` it
    is the first that has no more than ``wanted``, and nothing if there is none.
    """
    chosen: set[bytes] = set()
    instead: bytes | None = None
    free = min(wanted, most)
    if not free:
        return chosen
    for key, rows in groups:
        if rows <= free:
            chosen.add(key)
            free -= rows
        elif rows <= wanted and instead is None:
            instead = key
        if not free:
            break
    return chosen or ({instead} if instead is not None else chosen)
