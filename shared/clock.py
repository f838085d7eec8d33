"""The time, in the units the wire uses. Leases use the clock of Redis instead."""

from __future__ import annotations

import time


def unix_now() -> int:
    """Now, in whole Unix seconds."""
    return int(time.time())
