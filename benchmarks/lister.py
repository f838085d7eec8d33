"""A process that lists image sets and ends batches, but runs no chunk: ``lister SETTINGS UNIT``.

It does the unit ``plan`` or ``final`` of the one batch there is, as a batch consumer would: claims it
under a lease, gives it back where the listing pauses for others, and claims it again. Prints the most
memory that it took, in bytes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.items import MODEL
from benchmarks.memory import peak_of
from shared.leases import CONTROL_LANE, PLAN, Lease, model_lane
from shared.settings import load_settings
from shared.stores import Stores
from workers.inference.control import run_control_unit
from workers.inference.listing import ListingPaused
from workers.keeper import Keeper
from workers.worker_names import worker_name

_POLL_S = 0.1
_LIMIT_S = 120.0


def main() -> None:
    """Do the unit to its end."""
    settings, unit = load_settings(Path(sys.argv[1])), sys.argv[2]
    # Named as batch consumers are, so that the node's reaper notices when this one dies.
    stores, name = Stores.connect(settings), worker_name(settings)
    stores.leases.register(name)
    keeper = Keeper(stores.leases, renew_s=settings.queue.renew_s)
    while True:
        lease = _claimed(stores, name, unit)
        try:
            with keeper.holding(lease):
                run_control_unit(lease, stores, keeper)
            break
        except ListingPaused:
            stores.leases.release(lease)
    sys.stdout.write(str(peak_of(os.getpid())))


def _claimed(stores: Stores, name: str, unit: str) -> Lease:
    """Wait for the unit, which nobody else holds. Raises: TimeoutError."""
    # Once something is listed the batch is in its model's lane, where the unit comes before chunks.
    lanes = (CONTROL_LANE, model_lane(MODEL)) if unit == PLAN else (CONTROL_LANE,)
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        for lane in lanes:
            lease = stores.leases.claim(lane, name)
            if lease is not None:
                assert lease.unit == unit, f"the unit {lease.unit} was offered in place of {unit}"
                return lease
        time.sleep(_POLL_S)
    raise TimeoutError(f"the unit {unit} was not offered within {_LIMIT_S:g} s")


if __name__ == "__main__":
    main()
