"""A finished batch as the data of a fine-tune: its answers are what is learned, its requests the questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import InvalidRequest
from shared.files import OUTPUT_PURPOSE, FileRecord
from shared.ids import derived_id, is_id
from shared.jobs import Batch

if TYPE_CHECKING:
    from shared.stores import Stores


def batch_of_output(record: FileRecord) -> str | None:
    """The id of the batch whose output file this is, if it is one."""
    batch_id = record.filename.removesuffix("_output.jsonl")
    if record.purpose != OUTPUT_PURPOSE or not is_id(batch_id, "batch_"):
        return None
    return batch_id if derived_id("file-", batch_id, "output") == record.id else None


def learnable_batch(stores: Stores, owner: str, batch_id: str) -> Batch:
    """The batch, if it can be learned from now.

    Raises: InvalidRequest that says what to do; NotFound if the batch is not there or a file of it
    was deleted.
    """
    batch = stores.batches.get(owner, batch_id)
    if not batch.is_terminal:
        raise InvalidRequest(
            f"the batch '{batch_id}' is {batch.state.value}: it has not ended; wait until it has, or "
            "cancel it to use what it has done"
        )
    if batch.output_file_id is None or batch.completed == 0:
        raise InvalidRequest(
            f"the batch '{batch_id}' has no answers to learn from; see its errors, or retry its "
            "failed lines and name that batch"
        )
    for file_id in files_learned_from(batch):
        stores.files.get(owner, file_id)
    return batch


def files_learned_from(batch: Batch) -> list[str]:
    """The files that must be there: results, the input, the uploads of an image set."""
    uploads = [] if batch.source is None else batch.source.file_ids
    files = (batch.input_file_id, batch.output_file_id, batch.error_file_id, *uploads)
    return list(dict.fromkeys(file_id for file_id in files if file_id is not None))
