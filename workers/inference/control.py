"""The control lane: planning batches before their chunks run and finalizing them afterwards."""

from __future__ import annotations

from collections.abc import Callable

from shared.captions import CaptionSource
from shared.errors import StorageFailed, WorkerCrashed
from shared.jobs import BatchProblem
from shared.leases import FINAL, PLAN, Lease
from shared.log import get_logger
from shared.stores import Stores
from workers.inference.chunk_input import input_path
from workers.inference.finalizing import finalize
from workers.inference.listing import Listing
from workers.inference.planning import Rejected, plan_batch
from workers.inference.uploads import upload_opener
from workers.keeper import Keeper, until_answered

log = get_logger(__name__)

_NOT_RECORDED = "the batch was not recorded"


def run_control_unit(
    lease: Lease, stores: Stores, keeper: Keeper, draining: Callable[[], bool] = lambda: False
) -> None:
    """Plan, list or finalize the batch that ``lease`` is about.

    Raises: what :func:`plan`, :func:`list_images` and ``finalize`` raise; the unit may then be tried
    again.
    """
    if lease.unit == PLAN and lease.spec.source is not None:
        list_images(lease, lease.spec.source, stores, keeper, draining)
    elif lease.unit == PLAN:
        plan(lease, stores, keeper)
    elif lease.unit == FINAL:
        finalize(lease, stores.batches, stores.files, stores.models, stores.layout, keeper.check)
        log.info("batch_finalized", batch_id=lease.batch_id)
    else:
        raise AssertionError(f"the control lane offered '{lease.unit}'")


def list_images(
    lease: Lease,
    source: CaptionSource,
    stores: Stores,
    keeper: Keeper,
    draining: Callable[[], bool],
) -> None:
    """List the batch's image set, or fail the batch if there is nothing in it.

    Raises: ListingPaused if others are to have the worker meanwhile.
    """
    if not stores.batches.is_recorded(lease.spec):
        _reject(lease, stores, keeper, 0, BatchProblem(StorageFailed.code, _NOT_RECORDED))
        return
    listing = Listing(
        lease,
        source,
        stores,
        upload_opener(stores, lease.spec.owner),
        keep_going=keeper.check,
        draining=draining,
    )
    try:
        listing.run()
    except Rejected as rejection:
        _reject(lease, stores, keeper, rejection.total, rejection.problem)


def _reject(
    lease: Lease, stores: Stores, keeper: Keeper, total: int, problem: BatchProblem
) -> None:
    until_answered(lambda: stores.batches.rejected(lease, total, [problem]), keeper.check)
    log.info("batch_rejected", batch_id=lease.batch_id, code=problem.code)


def plan(lease: Lease, stores: Stores, keeper: Keeper) -> None:
    """Write the batch's manifest, or fail the batch if nothing of its input can be run."""
    source = input_path(lease.spec, stores.layout)
    assert source is not None, "a batch has an input file or an image set"
    try:
        if not stores.batches.is_recorded(lease.spec):
            raise Rejected(0, BatchProblem(StorageFailed.code, _NOT_RECORDED))
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
        _reject(lease, stores, keeper, rejection.total, rejection.problem)
        return
    until_answered(lambda: stores.batches.planned(lease, found), keeper.check)
    log.info("batch_planned", batch_id=lease.batch_id, chunks=found.chunks, total=found.total)
    stores.tickets.batch(found.model, min(found.chunks, stores.settings.queue.ticket_window))
