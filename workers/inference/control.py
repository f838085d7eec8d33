"""The control lane: planning batches before their chunks run and finalizing them afterwards."""

from __future__ import annotations

from shared.errors import StorageFailed, WorkerCrashed
from shared.jobs import BatchProblem
from shared.leases import FINAL, PLAN, Lease
from shared.log import get_logger
from shared.stores import Stores
from workers.inference.finalizing import finalize
from workers.inference.planning import Rejected, plan_batch
from workers.keeper import Keeper, until_answered

log = get_logger(__name__)


def run_control_unit(lease: Lease, stores: Stores, keeper: Keeper) -> None:
    """Plan or finalize the batch that ``lease`` is about.

    Raises: what :func:`plan` and ``finalize`` raise; the unit may then be tried again.
    """
    if lease.unit == PLAN:
        plan(lease, stores, keeper)
    elif lease.unit == FINAL:
        finalize(lease, stores.batches, stores.files, stores.layout, keeper.check)
        log.info("batch_finalized", batch_id=lease.batch_id)
    else:
        raise AssertionError(f"the control lane offered '{lease.unit}'")


def plan(lease: Lease, stores: Stores, keeper: Keeper) -> None:
    """Write the batch's manifest, or fail the batch if nothing of its input can be run."""
    source = stores.layout.file_dir(lease.spec.input_file_id) / "content"
    try:
        if not stores.batches.is_recorded(lease.spec):
            raise Rejected(0, BatchProblem(StorageFailed.code, "the batch was not recorded"))
        if not source.exists():
            raise Rejected(0, BatchProblem("not_found", "the input file was deleted"))
        if lease.attempts >= stores.settings.queue.max_chunk_attempts:
            raise Rejected(0, BatchProblem(WorkerCrashed.code, "planning this file kept failing"))
        found = plan_batch(
            source,
            stores.batches.folder(lease.batch_id),
            stores.settings.queue,
            knows_model=lambda name: stores.models.knows(name, lease.spec.owner),
            keep_going=keeper.check,
        )
    except Rejected as rejection:
        problem = rejection.problem
        total = rejection.total
        until_answered(lambda: stores.batches.rejected(lease, total, [problem]), keeper.check)
        log.info("batch_rejected", batch_id=lease.batch_id, code=problem.code)
        return
    until_answered(lambda: stores.batches.planned(lease, found), keeper.check)
    log.info("batch_planned", batch_id=lease.batch_id, chunks=found.chunks, total=found.total)
    stores.tickets.batch(found.model, min(found.chunks, stores.settings.queue.ticket_window))
