"""One batch consumer process: claim a unit, do it, record it, until its ticket's time is up.

Lives in a prefork child. Everything here is created after the fork.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shared.errors import (
    BatchCancelled,
    BatchExpired,
    EngineUnavailable,
    LeaseLost,
    ModelNotFound,
    QueueUnavailable,
    StorageFailed,
    StorageFull,
    VlmqError,
)
from shared.leases import CONTROL_LANE, Lease, model_of
from shared.log import get_logger
from shared.manifest import Manifest
from shared.models import ModelRecord
from shared.settings import Settings
from shared.stores import Stores
from workers.inference.batch import ChunkResult, ChunkRun, EnginesAway
from workers.inference.chunk_input import ChunkInput, FileInput, ImageSetInput, input_path
from workers.inference.control import run_control_unit
from workers.inference.engines.base import Tiling
from workers.inference.engines.flight import Flight
from workers.inference.engines.standby import Standby
from workers.inference.entry_images import EntryImages
from workers.inference.listing import ListingPaused
from workers.inference.recalling import Recall
from workers.inference.uploads import OwnedImages, upload_opener
from workers.keeper import Keeper, until_answered

log = get_logger(__name__)

_MAX_RETRY_DELAY_S = 30.0


class Draining(VlmqError):
    """The worker is stopping; its work goes to another."""

    code = "draining"


class BatchWorker:
    """Works through leases of one lane at a time.

    ``is_draining`` says whether to stop claiming; ``must_stop`` whether to drop what is in hand.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        *,
        is_draining: Callable[[], bool],
        must_stop: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._name = name
        self._is_draining = is_draining
        self._must_stop = must_stop
        self._stores = Stores.connect(settings)
        self._keeper = Keeper(self._stores.leases, renew_s=settings.queue.renew_s)
        self._images = OwnedImages(settings.images, self._stores)
        self._flights: dict[str, Flight] = {}
        self._trouble = 0

    def run_slice(self, lane: str) -> None:
        """Claim and do units of ``lane`` until none is left or the slice is over."""
        ends_at = time.monotonic() + self._settings.queue.slice_s
        try:
            # Not once and for all: Redis may be away when this process starts, or be wiped later.
            self._stores.leases.register(self._name)
        except QueueUnavailable:
            return  # as below
        while not self._is_draining() and not self._engines_away(lane):
            try:
                lease = self._stores.leases.claim(lane, self._name)
            except QueueUnavailable:
                return  # the reaper publishes tickets when Redis is back
            if lease is None:
                return
            self._run_lease(lease)
            if time.monotonic() > ends_at:
                self._pass_on(lane)
                return

    def _engines_away(self, lane: str) -> bool:
        """Whether the lane's model is not loaded here; its chunks are for when it is.

        Those of a model that was removed need no engine to fail.
        """
        if lane == CONTROL_LANE:
            return False
        model = model_of(lane)
        if not Standby(self._settings.run_dir, model).is_on():
            return False
        try:
            return self._model(model) is not None
        except StorageFailed:
            return True  # the reaper publishes another ticket

    def _pass_on(self, lane: str) -> None:
        """Let the next ticket's holder go on with what is left."""
        try:
            if self._stores.leases.demand(lane, limit=1):
                if lane == CONTROL_LANE:
                    self._stores.tickets.control()
                else:
                    self._stores.tickets.batch(model_of(lane))
        except QueueUnavailable:
            log.warning("ticket_not_passed_on", lane=lane)  # the reaper tops tickets up

    def _run_lease(self, lease: Lease) -> None:
        bound = log.bind(batch_id=lease.batch_id, unit=lease.unit, attempt=lease.attempts + 1)
        try:
            with self._keeper.holding(lease):
                self._do(lease)
            self._trouble = 0
        except LeaseLost:
            bound.warning("lease_lost")
        except (BatchCancelled, BatchExpired, Draining, EnginesAway):
            self._release(lease, 0, "")
        except ListingPaused:
            self._release(
                lease, self._settings.queue.slice_s, ""
            )  # not to be claimed at once again
        except StorageFull as error:
            bound.error("storage_full", error=str(error))
            self._back_off(lease, error.code)
        except (StorageFailed, EngineUnavailable, QueueUnavailable) as error:
            bound.error("unit_postponed", error=str(error))
            self._back_off(lease, error.code)
        except Exception:  # noqa: BLE001 - a bug here must not stop the worker; it is capped
            bound.exception("unit_failed")
            self._back_off(lease, "internal_error", counts=True)

    def _do(self, lease: Lease) -> None:
        if lease.unit.isdigit():
            self._run_chunk(lease)
        else:
            run_control_unit(lease, self._stores, self._keeper, self._is_draining)

    def _run_chunk(self, lease: Lease) -> None:
        flight = self._flight(lease.model)
        batch_dir = self._stores.batches.folder(lease.batch_id)
        manifest = Manifest(batch_dir)
        run = ChunkRun(
            lease,
            batch_dir=batch_dir,
            manifest=manifest,
            chunk_input=self._input(lease, manifest, lambda: flight.tiling),
            model=self._model(lease.model),
            settings=self._settings,
            flight=flight,
            keep_going=self._check,
            recall=self._recall(lease, manifest),
        )
        if self._commit(lease, run.run()):
            self._stores.tickets.control()

    def _recall(self, lease: Lease, manifest: Manifest) -> Recall | None:
        if manifest.plan.sync is None:
            return None
        stores = self._stores
        return Recall(lease.spec, manifest, stores.layout, stores.batches, self._check)

    def _input(
        self, lease: Lease, manifest: Manifest, tiling: Callable[[], Tiling | None]
    ) -> ChunkInput:
        spec = lease.spec
        if spec.source is not None:
            images = EntryImages(
                self._settings.images,
                upload_opener(self._stores, spec.owner),
                self._images.load_url,
            )
            return ImageSetInput(spec.source, manifest, images, self._images.preparer(tiling))
        source = input_path(spec, self._stores.layout)
        assert source is not None, "a batch has an input file or an image set"
        return FileInput(
            source,
            endpoint=spec.endpoint,
            model=lease.model,
            knows_model=lambda name: self._stores.models.knows(name, spec.owner),
            max_line_bytes=self._settings.queue.max_line_bytes,
            read_image=self._images.reader(spec.owner, tiling),
        )

    def _model(self, name: str) -> ModelRecord | None:
        try:
            return self._stores.models.get(name)
        except ModelNotFound:
            return None  # removed while the batch ran

    def _commit(self, lease: Lease, result: ChunkResult) -> bool:
        """Tell Redis of the shard, however long it is away; says whether it was the last one."""
        return until_answered(
            lambda: self._stores.batches.committed(lease, result.header, result.problems),
            self._check,
        )

    def _check(self) -> None:
        self._keeper.check()
        if self._must_stop():
            raise Draining()

    def _back_off(self, lease: Lease, warning: str, *, counts: bool = False) -> None:
        self._trouble = min(self._trouble + 1, 10)
        delay_s = min(_MAX_RETRY_DELAY_S, 0.25 * 2**self._trouble)
        self._release(lease, delay_s, warning, counts=counts)

    def _release(self, lease: Lease, delay_s: float, warning: str, *, counts: bool = False) -> None:
        try:
            self._stores.leases.release(lease, delay_s=delay_s, warning=warning, counts=counts)
            self._pass_on(CONTROL_LANE)  # giving up the last chunk of a stopped batch ends it
        except QueueUnavailable:
            log.warning("lease_not_released", batch_id=lease.batch_id)  # it expires by itself

    def _flight(self, model: str) -> Flight:
        if model not in self._flights:
            self._flights[model] = Flight(self._settings.run_dir, model)
        return self._flights[model]
