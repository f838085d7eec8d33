"""The reaper: work that nobody holds any more is offered again, and tickets that are missing.

A loop on every node. What concerns this node alone (worker processes that died here) each does for
itself; the rest is done by whoever holds one lock in Redis. ``python -m workers.reaper``.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from shared import log as logs
from shared.connection import PREFIX
from shared.errors import (
    IllegalTransition,
    NotFound,
    QueueUnavailable,
    StorageFailed,
    StorageFull,
    VlmqError,
)
from shared.ids import new_id
from shared.leases import CONTROL_LANE, model_of
from shared.log import get_logger
from shared.process import die_with_parent
from shared.queue import CONTROL_QUEUE, FINETUNE_QUEUE, batch_queue
from shared.rebuild import missing_batches, missing_finetunes
from shared.retention import clear_leftovers, sweep
from shared.settings import Settings, load_settings
from shared.stores import Stores
from workers.worker_names import WorkerName

log = get_logger(__name__)

_LOCK = f"{PREFIX}reaper"
_SERVER_RUN = f"{PREFIX}server_run"
_PATIENCE = f"{PREFIX}patience"
_SWEEP_EVERY_S = 60.0
_CLEAR_EVERY_S = 3600.0


class Reaper:
    """One node's reaper."""

    def __init__(self, settings: Settings, stores: Stores) -> None:
        self._settings = settings
        self._stores = stores
        self._id = new_id("reaper_")
        self._swept_at = 0.0
        self._cleared_at = 0.0

    def run(self, stopping: threading.Event) -> None:
        """Turn until ``stopping`` is set; while Redis is away, wait for it."""
        while not stopping.wait(self._settings.queue.reap_s):
            try:
                self.turn()
            except QueueUnavailable as error:
                log.warning("reaper_waits", error=str(error))
            except VlmqError as error:
                log.error("reaper_turn_failed", error=str(error))  # noqa: TRY400 - its message says all

    def turn(self) -> None:
        """One look at everything. Raises: QueueUnavailable, StorageFailed."""
        self._bury_own_workers()
        if not self._leads():
            return
        self._watch_server()
        if not self._stores.redis.exists(_PATIENCE):
            self._reap()
        self._expire_batches()
        self._top_up_tickets()
        if time.monotonic() - self._swept_at > _SWEEP_EVERY_S:
            self._swept_at = time.monotonic()
            sweep(self._stores)
        if time.monotonic() - self._cleared_at > _CLEAR_EVERY_S:
            self._cleared_at = time.monotonic()
            clear_leftovers(self._stores)

    def _bury_own_workers(self) -> None:
        """Take back at once what dead processes of this very run of this node held."""
        node = self._settings.node
        if not node.run_id:
            return
        dead, forgotten = [], []
        for worker in self._stores.leases.workers():
            name = WorkerName.read(worker)
            if name is None or name.node != node.name:
                continue
            if name.run_id != node.run_id:
                forgotten.append(worker)  # of an earlier run: what it held expires by itself
            elif not name.is_alive:
                dead.append(worker)
        if dead:
            self._reap(dead)
        self._stores.leases.unregister(dead + forgotten)

    def _leads(self) -> bool:
        """Hold, take or miss the lock."""
        ttl_ms = int(self._settings.queue.reap_s * 5000)
        if self._stores.redis.set(_LOCK, self._id, nx=True, px=ttl_ms):
            return True
        if self._stores.redis.get(_LOCK) != self._id.encode():
            return False
        self._stores.redis.pexpire(_LOCK, ttl_ms)
        return True

    def _watch_server(self) -> None:
        """After a restart of Redis give every holder one TTL to renew before reaping."""
        run = str(self._stores.redis.info("server")["run_id"]).encode()
        if self._stores.redis.get(_SERVER_RUN) != run:
            patience_s = self._settings.queue.lease_ttl_s
            # In Redis, so that it holds for whichever node's reaper leads next.
            self._stores.redis.set(_PATIENCE, b"1", px=int(patience_s * 1000))
            self._stores.redis.set(_SERVER_RUN, run)
            log.info("redis_is_new", patience_s=patience_s)
            missing = missing_batches(self._stores.redis, self._stores.layout)
            if missing:
                log.error("redis_lacks_batches", missing=missing, advice="vlmq doctor --rebuild")
            missing = missing_finetunes(self._stores.redis, self._stores.layout)
            if missing:
                log.error("redis_lacks_finetunes", missing=missing, advice="vlmq doctor --rebuild")

    def _expire_batches(self) -> None:
        for batch_id in self._stores.batches.overdue():
            try:
                self._stores.batches.stop(batch_id, "expired")
                log.info("batch_expired", batch_id=batch_id)
            except (IllegalTransition, NotFound):
                log.info("batch_ended_first", batch_id=batch_id)
            except (StorageFull, StorageFailed) as error:
                # The next turn tries again; the sweep of this one may make room.
                log.error("batch_not_expired", batch_id=batch_id, error=str(error))  # noqa: TRY400

    def _top_up_tickets(self) -> None:
        window = self._settings.queue.ticket_window
        missing = self._stores.finetunes.demand(limit=window)
        for _ in range(missing - self._stores.tickets.waiting(FINETUNE_QUEUE)):
            self._stores.tickets.finetune()
        for lane in self._stores.leases.lanes():
            demand = self._stores.leases.demand(lane, limit=window)
            if lane == CONTROL_LANE:
                missing = demand - self._stores.tickets.waiting(CONTROL_QUEUE)
                for _ in range(missing):
                    self._stores.tickets.control()
                continue
            model = model_of(lane)
            missing = demand - self._stores.tickets.waiting(batch_queue(model))
            self._stores.tickets.batch(model, max(0, missing))

    def _reap(self, dead_workers: Sequence[str] = ()) -> None:
        taken = [
            *self._stores.leases.reap(dead_workers),
            *self._stores.finetunes.reap(dead_workers),
        ]
        if taken:
            log.warning("leases_reaped", units=taken)


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args()
    die_with_parent()
    settings = load_settings(arguments.config)
    logs.configure("reaper", level=settings.log_level)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN if os.getpgrp() != os.getpid() else signal.SIG_DFL)
    Reaper(settings, Stores.connect(settings)).run(stopping)


if __name__ == "__main__":
    main()
