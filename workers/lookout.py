"""What the fleet must know from elsewhere: which models batches want, and what records say.

A thread, because Redis and shared storage may hang and the watching of engines must not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from shared.connection import connect
from shared.errors import VlmqError
from shared.leases import Leases, model_lane
from shared.log import get_logger
from shared.models import ModelRecord, ModelRegistry
from shared.scripts import Scripts
from shared.settings import Settings
from shared.storage import Layout

log = get_logger(__name__)

TURN_S = 0.5
_RECORDS_EVERY = 2
"""Records are read every so many turns."""


class Lookout:
    """The latest answers; what cannot be asked now keeps its last one."""

    def __init__(self, settings: Settings, records: Mapping[str, ModelRecord]) -> None:
        self.wanted: frozenset[str] = frozenset()
        """On-demand models with units that could be claimed now."""
        self.records = records
        """Linked models by name."""
        self._on_demand: tuple[str, ...] = ()
        self._redis = connect(settings, max_connections=2)
        self._leases = Leases(self._redis, Scripts(self._redis), ttl_s=settings.queue.lease_ttl_s)
        self._registry = ModelRegistry(Layout(settings.data_dir))
        self._closing = threading.Event()
        self._complained: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
        self._thread.start()

    def watch(self, on_demand: Iterable[str]) -> None:
        """Look at the batches of these models from now on."""
        self._on_demand = tuple(on_demand)

    def close(self) -> None:
        """Stop looking; does not wait for a storage that hangs."""
        self._closing.set()
        self._thread.join(timeout=2)
        self._redis.close()

    def _run(self) -> None:
        turn = 0
        while not self._closing.is_set():
            if turn % _RECORDS_EVERY == 0:
                self._read_records()
            self._count_demand()
            turn += 1
            self._closing.wait(TURN_S)

    def _read_records(self) -> None:
        try:
            self.records = self._registry.by_name()
            self._complained.discard("records")
        except VlmqError as error:
            self._complain("records", error)

    def _count_demand(self) -> None:
        try:
            self.wanted = frozenset(
                model
                for model in self._on_demand
                if self._leases.demand(model_lane(model), limit=1)
            )
            self._complained.discard("demand")
        except VlmqError as error:
            self._complain("demand", error)

    def _complain(self, what: str, error: VlmqError) -> None:
        if what not in self._complained:
            self._complained.add(what)
            log.warning("fleet_cannot_look", what=what, reason=error.message)
