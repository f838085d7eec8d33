"""Deleting what has had its time: expired files, old uploads, old batches and their results.

Only what the settings say, only what has ended, and never a file that a live batch reads.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from shared.clock import unix_now
from shared.errors import NotFound
from shared.jobs import Batch
from shared.log import get_logger

if TYPE_CHECKING:
    from shared.stores import Stores

log = get_logger(__name__)

_DAY_S = 86_400


def sweep(stores: Stores) -> int:
    """Delete what is due; returns how many things that was.

    Raises: QueueUnavailable, StorageFailed.
    """
    storage = stores.settings.storage
    count = 0
    for record in stores.files.overdue():
        stores.files.discard(record)
        count += 1
    if storage.keep_files_days is not None:
        for record in stores.files.uploaded_before(_ago(storage.keep_files_days)):
            stores.files.discard(record)
            count += 1
    if storage.keep_batches_days is not None:
        for batch in stores.batches.ended_before(_ago(storage.keep_batches_days)):
            _remove_batch(stores, batch)
            count += 1
    if count:
        log.info("swept", removed=count)
    return count


def _remove_batch(stores: Stores, batch: Batch) -> None:
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is None:
            continue
        with suppress(NotFound):  # its owner deleted it already
            stores.files.discard(stores.files.get(batch.owner, file_id))
    stores.batches.remove(batch)


def _ago(days: float) -> int:
    return unix_now() - int(days * _DAY_S)
