"""A process that lists the image set that waits: ``python listing_child.py SETTINGS.json``.

Prints the most memory that it took, in KiB.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shared.leases import CONTROL_LANE
from shared.settings import load_settings
from shared.stores import Stores
from workers.inference.control import run_control_unit
from workers.inference.listing import ListingPaused
from workers.keeper import Keeper


def main() -> None:
    """List to the end, however often the listing makes way for others."""
    stores = Stores.connect(load_settings(Path(sys.argv[1])))
    while not _listed(stores):
        pass
    status = Path("/proc/self/status").read_text()
    peak = next(row for row in status.splitlines() if row.startswith("VmHWM"))
    sys.stdout.write(peak.split()[1])


def _listed(stores: Stores) -> bool:
    """Go on with the listing, and say whether that was the last of it."""
    waiting = [stores.leases.claim(lane, "child") for lane in (CONTROL_LANE, "model/echo")]
    [lease] = [lease for lease in waiting if lease is not None]
    try:
        run_control_unit(lease, stores, Keeper(stores.leases, renew_s=5))
    except ListingPaused:
        stores.leases.release(lease)
        return False
    return True


if __name__ == "__main__":
    main()
