"""The fine-tune consumer's work: claim a job or a checkpoint, take it on, say what became of it.

Serves several threads, one claim each. At most ``finetune.max_jobs`` of them train at once; the
others validate, convert and compare, so that a new job never waits for a running one to be looked at.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from shared.errors import (
    ComparisonTimedOut,
    DatasetInvalid,
    EngineUnavailable,
    IllegalTransition,
    LeaseLost,
    NotEnoughDisk,
    QueueUnavailable,
    StorageFailed,
    StorageFull,
    TrainingCrashed,
    VlmqError,
)
from shared.finetune_store import FinetuneLease, FinetuneWork
from shared.finetunes import FinetuneError, FinetuneState
from shared.log import get_logger
from shared.settings import Settings
from shared.stores import Stores
from workers.finetune_report import tell_running
from workers.keeper import until_answered
from workers.training import registering
from workers.training.attempt import DISK_RETRY_S, Postponed
from workers.training.gpulocks import GpuLocks
from workers.training.holding import Draining, Holding, StopWanted
from workers.training.stages import Shop, Stages

log = get_logger(__name__)

SPARE_THREADS = 4
"""Threads beside those that train: for looking at new jobs, and for comparing old ones."""
_COMPARING = 2
_TROUBLE_RETRY_S = 10.0
_ROOM_RETRY_S = 2.0


def threads_of(settings: Settings) -> int:
    """How many threads the consumer needs."""
    return settings.finetune.max_jobs + SPARE_THREADS


class FinetuneWorker:
    """Takes tickets. ``stop`` lets trainings save a checkpoint and gives every job back."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._stores = Stores.connect(settings)
        self._draining = threading.Event()
        self._training = threading.Semaphore(settings.finetune.max_jobs)
        self._in_hand = threading.Semaphore(settings.finetune.max_jobs + _COMPARING)
        self._running: set[str] = set()
        self._lock = threading.Lock()
        gpus = GpuLocks(settings.run_dir, settings.finetune.gpus, served=self._served_gpus)
        self._shop = Shop(settings, self._stores, gpus)
        self._tell_running()

    def stop(self) -> None:
        """Begin to stop. Returns at once."""
        self._draining.set()

    def close(self) -> None:
        """Let go of connections, when no thread works any more."""
        self._stores.close()

    def run(self, _ticket: str) -> None:
        """Claim and do work until there is none that this worker could take now."""
        try:
            # Not once and for all: Redis may be away when this process starts, or be wiped later.
            self._stores.leases.register(self._name)
            while not self._draining.is_set():
                if not any(self._try(kind) for kind in ("checkpoint", "validate", "train")):
                    return
        except QueueUnavailable:
            return  # the reaper publishes tickets when Redis is back
        except (StorageFull, StorageFailed) as error:
            log.error("finetune_not_claimed", error=error.message)  # noqa: TRY400 - its message says all

    def _try(self, kind: FinetuneWork) -> bool:
        """Claim and do one piece of work; false if there is none of this kind to be had."""
        with self._room(kind) as done_training:
            if done_training is None:
                return False
            gpus = len(self._settings.finetune.gpus)
            lease = self._stores.finetunes.claim(kind, self._name, gpus)
            if lease is None:
                return False
            self._run_lease(lease, done_training)
            return True

    @contextlib.contextmanager
    def _room(self, kind: FinetuneWork) -> Iterator[Callable[[], None] | None]:
        """Room for a piece of work, or None. Calling it gives the place among the training back."""
        if kind != "train":
            yield lambda: None
            return
        with contextlib.ExitStack() as stack:
            for places in (self._in_hand, self._training):
                if not places.acquire(blocking=False):
                    yield None
                    return
                if places is self._in_hand:
                    stack.callback(places.release)
            training = stack.enter_context(contextlib.ExitStack())
            training.callback(self._training.release)
            yield training.close

    def _run_lease(self, lease: FinetuneLease, done_training: Callable[[], None]) -> None:
        bound = log.bind(job_id=lease.job_id, kind=lease.kind, attempt=lease.attempts + 1)
        bound.info("finetune_taken", token=lease.token)
        renew_s = self._settings.queue.renew_s
        with (
            Holding(
                self._stores.finetunes, lease, renew_s=renew_s, draining=self._draining
            ) as holding,
            self._noted(lease),
        ):
            outcome = _Outcome(self._stores, self._settings, lease, holding)
            try:
                self._require_attempts_left(lease)
                stages = Stages(self._shop, lease, holding, done_training)
                if lease.step is not None:
                    outcome.served(stages.convert_checkpoint(lease.step))
                elif lease.kind == "validate":
                    stages.validate()
                else:
                    stages.run()
                bound.info("finetune_done")
            except Exception as error:  # noqa: BLE001 - a bug must not stop the worker; it is capped
                done_training()
                self._settle(outcome, error)

    def _settle(self, outcome: _Outcome, error: Exception) -> None:
        """Say what became of the work; if nobody hears it, the lease expires by itself."""
        while True:
            try:
                outcome.settle(error)
            except StorageFull as full:
                # Nothing can be written down. It is kept in hand until there is room, for nobody
                # else could go on with it either.
                log.error("finetune_not_settled", job_id=outcome.job_id, error=full.message)  # noqa: TRY400
                if self._draining.wait(_ROOM_RETRY_S) or outcome.lost():
                    return
                continue
            except (LeaseLost, QueueUnavailable, Draining):
                log.warning("finetune_not_settled", job_id=outcome.job_id)
            except VlmqError as untold:
                log.error("finetune_not_settled", job_id=outcome.job_id, error=untold.message)  # noqa: TRY400
            return

    def _require_attempts_left(self, lease: FinetuneLease) -> None:
        """A job whose workers keep dying is given up, whatever it is that kills them."""
        if lease.attempts >= self._settings.finetune.max_attempts:
            raise TrainingCrashed(
                f"{lease.attempts} workers or trainers in a row died with this job without a new "
                "checkpoint; their machines' logs say why"
            )

    def _served_gpus(self) -> tuple[str, ...]:
        """GPUs that the fleet has to free. It answers for all of them, used by engines or not."""
        settings = self._settings
        return settings.finetune.gpus if "engines" in settings.node.roles else ()

    @contextlib.contextmanager
    def _noted(self, lease: FinetuneLease) -> Iterator[None]:
        """Have the node know which jobs are in hand."""
        with self._lock:
            self._running.add(lease.job_id)
            self._tell_running()
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(lease.job_id)
                self._tell_running()

    def _tell_running(self) -> None:
        try:
            tell_running(self._settings.run_dir, self._running)
        except (StorageFull, StorageFailed) as error:
            log.warning("running_jobs_untold", error=error.message)


class _Outcome:
    """What becomes of a job or a checkpoint when its work has ended by an exception."""

    def __init__(
        self, stores: Stores, settings: Settings, lease: FinetuneLease, holding: Holding
    ) -> None:
        self._stores = stores
        self._store = stores.finetunes
        self._settings = settings
        self._lease = lease
        self._holding = holding
        self.job_id = lease.job_id

    def served(self, model: str) -> None:
        """A checkpoint is converted and linked."""
        self._answered(lambda: self._store.finish_checkpoint(self._lease, model=model))

    def lost(self) -> bool:
        """Whether somebody else has the work by now."""
        try:
            self._holding.check_held()
        except LeaseLost:
            return True
        except Draining:
            return False
        return False

    def settle(self, error: Exception) -> None:
        """Raises: LeaseLost, QueueUnavailable, StorageFull, StorageFailed."""
        bound = log.bind(job_id=self.job_id, kind=self._lease.kind)
        match error:
            case LeaseLost():
                bound.warning("lease_lost")
            case StopWanted():
                self._stop(error)
            case Draining():
                self._give_back(0, None)
            case Postponed():
                bound.warning("finetune_postponed", reason=error.waiting_for)
                self._give_back(
                    error.delay_s, error.waiting_for, counts=error.counts, message=error.event
                )
            case ComparisonTimedOut():
                self._pause(error)
            case StorageFull() if not isinstance(error, NotEnoughDisk):
                bound.error("storage_full", error=error.message)
                self._give_back(DISK_RETRY_S, "space on the disk", message=error.message)
            case StorageFailed() | QueueUnavailable() | EngineUnavailable():
                bound.error("finetune_postponed", error=error.message)
                self._give_back(_TROUBLE_RETRY_S, error.message)
            case VlmqError():
                bound.error("finetune_failed", code=error.code, error=error.message)
                self._fail(error)
            case _:
                bound.error("finetune_bug", exc_info=error)
                words = f"Something went wrong inside vlmq ({type(error).__name__}: {error})"
                self._give_back(_TROUBLE_RETRY_S, "a worker", counts=True, message=words)

    def _stop(self, error: StopWanted) -> None:
        if error.wanted == "cancel":
            registering.drop_candidate(self._stores, self._lease.job)
            self._move(FinetuneState.CANCELLED, "Cancelled; its checkpoints are kept")
        else:
            self._move(
                FinetuneState.PAUSED,
                "Paused; when it is resumed it goes on from its last checkpoint",
            )

    def _pause(self, error: VlmqError) -> None:
        """Nothing is wrong with what was trained: its owner can resume it when models are served."""
        spec = self._lease.job
        try:
            self._answered(lambda: self._store.want(spec.owner, spec.id, "pause"))
        except IllegalTransition:
            self._stop(StopWanted("cancel"))
            return
        self._move(FinetuneState.PAUSED, f"Paused: {error.message}", level="error")

    def _fail(self, error: VlmqError) -> None:
        if self._lease.step is not None:
            self._answered(lambda: self._store.finish_checkpoint(self._lease, error=error.message))
            return
        registering.drop_candidate(self._stores, self._lease.job)
        report = error.report if isinstance(error, DatasetInvalid) else {}
        fields = {"data_report": report} if report else {}
        self._move(
            FinetuneState.FAILED,
            f"Failed: {error.message}",
            level="error",
            error=FinetuneError(error.code, error.message, error.param),
            **fields,
        )

    def _move(
        self,
        to: FinetuneState,
        message: str,
        *,
        level: Literal["info", "error"] = "info",
        **fields: Any,
    ) -> None:
        self._answered(
            lambda: self._store.move(self._lease, to, message=message, level=level, **fields)
        )

    def _give_back(
        self,
        delay_s: float,
        waiting_for: str | None,
        *,
        counts: bool = False,
        message: str | None = None,
    ) -> None:
        self._store.release(
            self._lease,
            delay_s=delay_s,
            waiting_for=waiting_for,
            counts=counts,
            message=message,
            level="info" if message is None else "warn",
        )

    def _answered(self, call: Callable[[], object]) -> None:
        until_answered(call, self._holding.check_held)
