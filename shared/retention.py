"""Deleting what has had its time: expired files, old uploads, old jobs and their results.

Only what the settings say, only what has ended, and never a file that a live job reads or the
folder of a model that is registered.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shared.caption_sets import sets_unused_since
from shared.clock import unix_now
from shared.errors import NotFound
from shared.finetunes import Finetune
from shared.jobs import Batch
from shared.log import get_logger
from shared.storage import TEMPORARY_SUFFIX, remove_tree, storage_errors

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
    if storage.keep_caption_sets_days is not None:
        for folder in sets_unused_since(stores.layout, _ago(storage.keep_caption_sets_days)):
            # A sync that begins meanwhile asks anew about what is gone.
            remove_tree(folder)
            count += 1
    if storage.keep_finetunes_days is not None:
        for job in stores.finetunes.ended_before(_ago(storage.keep_finetunes_days)):
            count += _remove_finetune(stores, job)
    if count:
        log.info("swept", removed=count)
    return count


def clear_leftovers(stores: Stores) -> int:
    """Delete what killed programs left half-written more than a day ago; returns how many things.

    An upload without ``file.json``, or a fine-tune without ``job.json``, was never acknowledged, and
    a folder being deleted has a name of its own. Raises: StorageFailed.
    """
    count = 0
    layout = stores.layout
    written_last = {
        layout.files: "file.json",
        layout.batches: None,
        layout.captions: None,
        layout.finetunes: "job.json",
    }
    for parent, record in written_last.items():
        for folder in _folders(parent):
            half_deleted = folder.name.endswith(TEMPORARY_SUFFIX)
            half_made = record is not None and not (folder / record).exists()
            if (half_deleted or half_made) and _is_old(folder):
                remove_tree(folder)
                count += 1
    if count:
        log.info("leftovers_cleared", removed=count)
    return count


def _folders(parent: Path) -> list[Path]:
    with storage_errors(parent):
        return [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir()]


def _is_old(folder: Path) -> bool:
    """Whether nothing in the folder was touched for a day. A folder that is gone is not."""
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except FileNotFoundError:
        return False
    return newest < unix_now() - _DAY_S


def _remove_batch(stores: Stores, batch: Batch) -> None:
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is not None:
            _discard_result(stores, batch.owner, file_id)
    stores.batches.remove(batch)


def _remove_finetune(stores: Stores, job: Finetune) -> bool:
    """Delete a job with its checkpoints, unless a registered model is in its folder."""
    folder = stores.finetunes.path(job.id).resolve()
    paths = [Path(record.path) for record in stores.models.list() if record.path is not None]
    if any(path.resolve().is_relative_to(folder) for path in paths):
        return False
    for file_id in job.result_files:
        _discard_result(stores, job.owner, file_id)
    stores.finetunes.remove(job)
    return True


def _discard_result(stores: Stores, owner: str, file_id: str) -> None:
    with suppress(NotFound):  # its owner deleted it already
        stores.files.discard(stores.files.get(owner, file_id))


def _ago(days: float) -> int:
    return unix_now() - int(days * _DAY_S)
