"""A new batch of the failed lines of one that has ended, copied as they were from its input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from shared.batches import BatchStore
from shared.errors import IllegalTransition, InvalidRequest, InvalidValue, NotFound, StorageFailed
from shared.files import FileRecord, FileStore, FileWriter
from shared.jobs import Batch, BatchState
from shared.manifest import Chunk
from shared.results import ResultStore
from shared.storage import storage_errors

_BLOCK_BYTES = 256 * 1024


class Retries:
    """Make batches of failed lines."""

    def __init__(self, batches: BatchStore, files: FileStore, results: ResultStore) -> None:
        self._batches = batches
        self._files = files
        self._results = results

    def source_bytes(self, owner: str, batch_id: str) -> int:
        """The most that has to be read to retry a batch; 0 if it cannot be."""
        try:
            batch = self._batches.get(owner, batch_id)
            if batch.input_file_id is None:
                return 0
            return self._files.get(owner, batch.input_file_id).bytes
        except NotFound:
            return 0

    def create(self, owner: str, batch_id: str) -> Batch:
        """A batch like that of its failed lines, with an input file of its own.

        Raises: NotFound, for its error file, too; IllegalTransition if it has not ended;
        InvalidRequest if nothing of it failed or could be run; InvalidValue if its input was
        deleted; StorageFull, StorageFailed; then nothing is left of it. QueueUnavailable; then the
        new file may be left, for its owner to delete.
        """
        batch = self._batches.get(owner, batch_id)
        self._check(batch)
        if batch.input_file_id is None:
            return self._of_image_set(batch)
        source = self._source(batch, batch.input_file_id)
        path = self._files.content_path(batch.owner, source.id)
        filename = f"{batch.id}_retry.jsonl"
        with self._files.begin(owner=batch.owner, filename=filename, purpose="batch") as writer:
            with storage_errors(path), open(path, "rb") as stream:
                _copy_lines(self._results.failed_lines(batch), path, stream, writer)
            record = writer.commit()
        try:
            return self._batches.create(
                owner=batch.owner,
                input_file=record,
                endpoint=batch.endpoint,
                completion_window=batch.completion_window,
                metadata=batch.metadata,
                output_expires_after_s=batch.output_expires_after_s,
                retry_of=batch.id,
            )
        except BaseException:
            self._files.discard(record)
            raise

    def _of_image_set(self, batch: Batch) -> Batch:
        """Nothing is copied here: a worker finds the failed entries as it lists a set."""
        assert batch.source is not None, "a batch has an input file or an image set"
        assert batch.error_file_id is not None, "something failed"
        self._files.get(batch.owner, batch.error_file_id)
        for file_id in batch.source.file_ids:
            self._require_upload(batch.owner, file_id)
        return self._batches.create(
            owner=batch.owner,
            source=batch.source,
            endpoint=batch.endpoint,
            completion_window=batch.completion_window,
            metadata=batch.metadata,
            output_expires_after_s=batch.output_expires_after_s,
            retry_of=batch.id,
        )

    def _require_upload(self, owner: str, file_id: str) -> None:
        try:
            self._files.get(owner, file_id)
        except NotFound:
            raise InvalidValue(
                f"the upload '{file_id}' that holds images of the batch was deleted; upload it again "
                "and make a new caption job",
                param="images",
            ) from None

    def _check(self, batch: Batch) -> None:
        if not batch.is_terminal:
            raise IllegalTransition(
                f"the batch is {batch.state}; its failed lines can be retried once it has ended"
            )
        if batch.error_file_id is None:
            raise InvalidRequest(_nothing_to_retry(batch), param="batch_id")

    def _source(self, batch: Batch, file_id: str) -> FileRecord:
        """The file that holds the text of the batch's failed lines."""
        try:
            return self._files.get(batch.owner, file_id)
        except NotFound:
            raise InvalidValue(
                f"the batch's input file '{file_id}' was deleted, and with it the text "
                "of the failed lines; upload them again and make a new batch",
                param="input_file_id",
            ) from None


def _nothing_to_retry(batch: Batch) -> str:
    if batch.state == BatchState.FAILED:
        return "nothing of the batch could be run; correct its input and make a new batch"
    stopped = batch.state != BatchState.COMPLETED and batch.total == 0
    if stopped and batch.source is not None:
        return "the batch was stopped before its images were listed; make a new caption job"
    if stopped:
        return (
            "the batch was stopped before its lines were counted; make a new batch of its "
            f"input file '{batch.input_file_id}'"
        )
    return "no line of the batch failed; there is nothing to retry"


def _copy_lines(
    failed: Iterable[tuple[Chunk, frozenset[int]]],
    path: Path,
    stream: BinaryIO,
    writer: FileWriter,
) -> None:
    """Copy the lines of these numbers, a block at a time however long they are."""
    for chunk, numbers in failed:
        stream.seek(chunk.offset)
        for number in range(chunk.first_line, max(numbers) + 1):
            if not _copy_line(stream, writer if number in numbers else None):
                raise StorageFailed(f"{path} is shorter than when the batch was planned")


def _copy_line(stream: BinaryIO, writer: FileWriter | None) -> bool:
    """Read a line, and write it if there is a writer; says whether there was one."""
    found = False
    while piece := stream.readline(_BLOCK_BYTES):
        found = True
        if writer is not None:
            writer.write(piece)
        if piece.endswith(b"\n"):
            return True
    if found and writer is not None:
        writer.write(b"\n")
    return found
