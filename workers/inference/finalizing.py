"""Finalizing a batch: join its shards into the output and error files, in the chunks' order.

The files' ids follow from the batch's, so a finalizer that is killed or paused half way is simply
repeated: the second run writes the same names with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared.batches import BatchStore
from shared.clock import unix_now
from shared.errors import BatchCancelled, BatchExpired, StorageFailed, VlmqError
from shared.files import OUTPUT_PURPOSE, FileRecord, FileStore
from shared.ids import derived_id
from shared.jobs import Batch, BatchSpec, BatchState, StopReason
from shared.leases import Lease
from shared.manifest import Chunk, Manifest
from shared.models import ModelRegistry
from shared.results import IndexWriter
from shared.shards import (
    ShardHeader,
    copy_errors,
    copy_output,
    read_header,
    read_provenance,
    shard_path,
)
from shared.storage import Layout, atomic_file, remove_tree, storage_errors, write_all, write_json
from workers.inference.batch_lines import error_line, item_id
from workers.inference.chunk_input import input_path, lines_of
from workers.inference.remembering import remember
from workers.keeper import until_answered

_TICK_EVERY = 16


class _Totals(msgspec.Struct):
    completed: int = 0
    failed: int = 0


def finalize(
    lease: Lease,
    batches: BatchStore,
    files: FileStore,
    models: ModelRegistry,
    layout: Layout,
    keep_going: Callable[[], None],
) -> None:
    """Write the output and error files and end the batch.

    ``keep_going`` is called between shards and may raise to stop.
    Raises: LeaseLost, StorageFull, StorageFailed, QueueUnavailable; the unit may then be retried.
    """
    spec = lease.spec
    batch = batches.get(spec.owner, spec.id)
    join = _Join(lease, batch, batches, layout, keep_going)
    totals = _Totals()
    output = _write(spec, "output", layout, files, lambda target: join.output(target, totals))
    errors = _write(spec, "errors", layout, files, lambda target: join.errors(target, totals))
    join.index.write(batches.folder(spec.id))
    remember(lease, batches, models, layout, keep_going)
    join.write_provenance()
    state = _terminal(batch.stop_reason, totals, batch.total)
    until_answered(
        lambda: batches.finished(
            lease,
            state,
            output_file_id=output.id if output else None,
            error_file_id=errors.id if errors else None,
            completed=totals.completed,
            failed=totals.failed,
        ),
        keep_going,
    )
    remove_tree(batches.folder(spec.id) / "shards")


def _terminal(stopped: StopReason | None, totals: _Totals, total: int) -> BatchState:
    if stopped == "cancelled":
        return BatchState.CANCELLED
    if stopped == "expired":
        return BatchState.EXPIRED
    if totals.completed + totals.failed != total:
        raise StorageFailed(
            f"{totals.completed + totals.failed} of {total} lines are accounted for"
        )
    return BatchState.COMPLETED


class _Join:
    """Copies the committed shards' parts and accounts for chunks that were never done."""

    def __init__(
        self,
        lease: Lease,
        batch: Batch,
        batches: BatchStore,
        layout: Layout,
        keep_going: Callable[[], None],
    ) -> None:
        spec = self._spec = lease.spec
        stopped = batch.stop_reason
        self._folder = batches.folder(spec.id)
        self._commits = batches.commits(lease)
        self._manifest = Manifest(self._folder) if Manifest.exists(self._folder) else None
        self._planned = self._manifest.plan.chunks if self._manifest else 0
        if spec.source is not None:
            # A listing that was stopped may have written more than was ever told.
            self._planned = min(self._planned, batch.chunks)
        self.index = IndexWriter(self._planned)
        self._source = input_path(spec, layout)
        self._provenance: dict[bytes, list[int]] = {}
        self._never_ran: type[VlmqError] = BatchExpired if stopped == "expired" else BatchCancelled
        self._keep_going = keep_going

    def output(self, target: BinaryIO, totals: _Totals) -> None:
        """Write all output lines."""
        for chunk, path in self._shards():
            header = read_header(path)
            copy_output(path, header, target)
            self._note_provenance(chunk, path, header)
            self.index.output(chunk, header.output_bytes)
            totals.completed += header.completed

    def errors(self, target: BinaryIO, totals: _Totals) -> None:
        """Write all error lines, those of chunks that were never done last."""
        done: set[int] = set()
        for index, token in self._commits:
            done.add(index)
            path = shard_path(self._folder, index, token)
            header = read_header(path)
            copy_errors(path, header, target)
            self.index.errors(index, header.error_bytes)
            totals.failed += header.failed
        for chunk in self._undone(done):
            totals.failed += self._write_undone(chunk, target)

    def _note_provenance(self, chunk: int, path: Path, header: ShardHeader) -> None:
        provenance = read_provenance(path, header)
        if provenance:
            self._provenance.setdefault(provenance, [chunk, 0])[1] += 1

    def write_provenance(self) -> None:
        """Keep what the shards say of themselves, for they go: one entry per difference."""
        if not self._provenance:
            return
        found = [
            {"first_chunk": first, "chunks": count, **msgspec.json.decode(provenance)}
            for provenance, (first, count) in self._provenance.items()
        ]
        write_json(self._folder / "provenance.json", found)

    def _shards(self) -> Iterator[tuple[int, Path]]:
        for count, (chunk, token) in enumerate(self._commits):
            if count % _TICK_EVERY == 0:
                self._keep_going()
            yield chunk, shard_path(self._folder, chunk, token)

    def _undone(self, done: set[int]) -> Iterator[Chunk]:
        if self._manifest is None:
            return
        for chunk in islice(self._manifest.chunks(), self._planned):
            if chunk.index not in done:
                self._keep_going()
                yield chunk

    def _write_undone(self, chunk: Chunk, target: BinaryIO) -> int:
        assert self._manifest is not None, "only a planned batch has chunks"
        error = self._never_ran()
        lines = [
            error_line(item_id(self._spec.id, line.number), line.custom_id(), error, in_batch=True)
            for line in lines_of(self._spec, self._manifest, self._source)(chunk)
        ]
        text = b"".join(lines)
        write_all(target, text)
        self.index.errors(chunk.index, len(text))
        return len(lines)


def _write(
    spec: BatchSpec,
    part: str,
    layout: Layout,
    files: FileStore,
    fill: Callable[[BinaryIO], None],
) -> FileRecord | None:
    """Write one result file through ``fill``; an empty one is not kept."""
    file_id = derived_id("file-", spec.id, part)
    folder = layout.file_dir(file_id)
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "content"
    with atomic_file(path) as stream:
        raw: BinaryIO = stream.raw  # type: ignore[attr-defined]
        fill(raw)
    size = path.stat().st_size
    if size == 0:
        remove_tree(folder)
        return None
    now = unix_now()
    lifetime = spec.output_expires_after_s
    return files.adopt(
        FileRecord(
            id=file_id,
            owner=spec.owner,
            bytes=size,
            created_at=now,
            filename=f"{spec.id}_{part}.jsonl",
            purpose=OUTPUT_PURPOSE,
            sha256=_sha256(path),
            expires_at=now + lifetime if lifetime else None,
        )
    )


def _sha256(path: Path) -> str:
    with storage_errors(path), open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
