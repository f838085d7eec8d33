"""Restoring Redis from shared storage, for when it was lost.

Everything that was acknowledged to a client is on disk: files, what batches and fine-tunes were
asked, their manifests, committed shards, states, events, requests to stop, and how they ended. Work
in progress is claimed anew. What is still in Redis is left as it is, so this may be run at any time, more than once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from shared.batches import COUNT, BatchStore, synced_set
from shared.connection import PREFIX, Connection
from shared.errors import StorageFailed, SyncInProgress
from shared.files import FileRecord, FileStore
from shared.finetune_store import FinetuneStore, used_by
from shared.jobs import Batch, BatchProblem, BatchSpec, BatchState
from shared.listing import adopt_listing
from shared.manifest import Manifest
from shared.scripts import Scripts
from shared.shards import ShardHeader, find_shards, read_header
from shared.storage import Layout, read_json
from shared.tally import total

_TOKEN_LEAP = 1 << 20
"""New tokens start this far above those on disk, out of reach of any that was still in use."""

_MAX_PROBLEMS = 100


def missing_batches(client: Any, layout: Layout) -> int:
    """How many batches are recorded on shared storage but not in Redis. Raises: QueueUnavailable.

    Anything but 0 means that Redis was lost, or another one is configured.
    """
    return _missing(client, layout.batches, "batch.json", "batch")


def missing_finetunes(client: Any, layout: Layout) -> int:
    """How many fine-tunes are so. Raises: QueueUnavailable."""
    return _missing(client, layout.finetunes, "job.json", "finetune")


def _missing(client: Any, parent: Path, record: str, kind: str) -> int:
    ids = [folder.name for folder in _visible(parent) if (folder / record).exists()]
    pipeline = client.pipeline(transaction=False)
    for job_id in ids:
        pipeline.exists(f"{PREFIX}{kind}:{job_id}")
    return sum(not exists for exists in pipeline.execute())


class RebuildReport(msgspec.Struct):
    """What was put back."""

    files: int = 0
    batches: int = 0
    chunks_kept: int = 0
    finetunes: int = 0
    damaged: list[str] = []
    """What could not be read. The chunk of a damaged shard is computed again."""


class Rebuild:
    """One pass over shared storage."""

    def __init__(
        self,
        client: Connection,
        scripts: Scripts,
        layout: Layout,
        files: FileStore,
        batches: BatchStore,
        finetunes: FinetuneStore,
    ) -> None:
        self._redis: Any = client
        self._scripts = scripts
        self._layout = layout
        self._files = files
        self._batches = batches
        self._finetunes = finetunes
        self.report = RebuildReport()

    def run(self) -> RebuildReport:
        """Put back what Redis lacks. Raises: QueueUnavailable."""
        batches = _visible(self._layout.batches)
        finetunes = _visible(self._layout.finetunes)
        self._each(batches, self._protect_input)
        self._each(finetunes, self._protect_data)
        self._each(_visible(self._layout.files), self._file)
        self._each(batches, self._batch)
        self._each(finetunes, self._finetune)
        self.report.damaged = sorted(set(self.report.damaged))
        return self.report

    def _each(self, folders: list[Path], restore: Callable[[Path], None]) -> None:
        """Restore what each folder holds; one that is damaged does not keep the others back."""
        for folder in folders:
            try:
                restore(folder)
            except (StorageFailed, SyncInProgress, msgspec.ValidationError) as error:
                self.report.damaged.append(f"{folder.name}: {error}")

    def _protect_input(self, folder: Path) -> None:
        """Name the user of an input file before the file is listed, and could be swept away."""
        value = read_json(folder / "batch.json")
        if value is not None and not (folder / "final.json").exists():
            spec = msgspec.convert(value, BatchSpec)
            for file_id in spec.files_used:
                self._redis.sadd(f"{PREFIX}users:{file_id}", spec.id)

    def _protect_data(self, folder: Path) -> None:
        job = self._finetunes.recorded(folder.name)
        if job is not None and not job.is_terminal:
            for used in used_by(job, self._layout):
                self._redis.sadd(f"{PREFIX}users:{used}", job.id)

    def _file(self, folder: Path) -> None:
        value = read_json(folder / "file.json")
        if value is None:
            return  # an upload that was never whole
        self._files.index(msgspec.convert(value, FileRecord))
        self.report.files += 1

    def _batch(self, folder: Path) -> None:
        value = read_json(folder / "batch.json")
        if value is None:
            return  # its creation was never acknowledged
        spec = msgspec.convert(value, BatchSpec)
        final = read_json(folder / "final.json")
        if final is not None:
            ended = msgspec.convert(final, Batch)
            self._restore(spec, _fields(ended), terminal=True, problems=ended.problems)
        elif Manifest.exists(folder):
            self._running(spec, folder)
        else:
            self._batches.enter(spec)
            self._stop_again(spec, folder)
        self.report.batches += 1

    def _finetune(self, folder: Path) -> None:
        job = self._finetunes.recorded(folder.name)
        if job is None:
            return  # its creation was never acknowledged
        self.report.damaged += self._finetunes.restore(job, token=_TOKEN_LEAP)
        self.report.finetunes += 1

    def _running(self, spec: BatchSpec, folder: Path) -> None:
        plan = Manifest(folder).plan
        tokens = self._tokens(folder)
        headers = self._headers(tokens)
        token = max((token for token, _ in tokens.values()), default=0)
        if plan.parts:
            token = max(token, plan.parts[-1].token)
            if not self._redis.exists(f"{PREFIX}batch:{spec.id}"):
                # Whoever was listing it holds no lease any more, and must not take this for his.
                plan = adopt_listing(folder, token + _TOKEN_LEAP)
        upcoming = max(headers, default=-1) + 1
        fields: dict[str, Any] = {
            "state": BatchState.IN_PROGRESS.value,
            "in_progress_at": spec.created_at,
            "model": plan.model,
            "chunks": plan.chunks,
            "total": plan.total,
            "next": upcoming,
            "committed": len(headers),
            "completed": sum(header.completed for header in headers.values()),
            "failed": sum(header.failed for header in headers.values()),
            "prompt_tokens": sum(header.prompt_tokens for header in headers.values()),
            "completion_tokens": sum(header.completion_tokens for header in headers.values()),
            "output_bytes": sum(header.output_bytes for header in headers.values()),
            **_counts(total(header.counts for header in headers.values())),
            "token": token + _TOKEN_LEAP,
        }
        if not plan.complete:
            fields["listing"] = 1
        if plan.parts:
            fields["listing_problems"] = len(plan.problems)
        if plan.seen is not None:
            fields |= {"seen": plan.seen, "seen_all": int(plan.seen_all)}
        if plan.sync is not None:
            fields["known"] = plan.sync.known
            fields["duplicates"] = plan.sync.duplicates
            fields["passed"] = plan.sync.passed
        if synced_set(spec):
            fields["syncs"] = synced_set(spec)
        stop = read_json(folder / "stop.json")
        if stop is not None:
            fields["stop_reason"] = stop["reason"]
            if stop["reason"] == "cancelled":
                fields["cancelling_at"] = stop["at"]
        commits = b"".join(
            struct.pack("<I", tokens[chunk][0] if chunk in headers else 0)
            for chunk in range(upcoming)
        )
        missing = [chunk for chunk in range(upcoming) if chunk not in headers]
        self._restore(
            spec,
            fields,
            commits=commits,
            missing=missing,
            problems=_problems(folder, plan.problems),
        )
        self.report.chunks_kept += len(headers)

    def _tokens(self, folder: Path) -> dict[int, tuple[int, Path]]:
        """The highest token of each chunk that has a shard, which is the committed one."""
        found: dict[int, tuple[int, Path]] = {}
        for chunk, token, path in find_shards(folder):
            if chunk not in found or token > found[chunk][0]:
                found[chunk] = (token, path)
        return found

    def _headers(self, tokens: dict[int, tuple[int, Path]]) -> dict[int, ShardHeader]:
        """What each shard holds; a damaged one is left out, so its chunk is computed again."""
        headers: dict[int, ShardHeader] = {}
        for chunk, (_, path) in tokens.items():
            try:
                headers[chunk] = read_header(path)
            except StorageFailed as error:
                self.report.damaged.append(error.message)
        return headers

    def _restore(
        self,
        spec: BatchSpec,
        fields: dict[str, Any],
        *,
        terminal: bool = False,
        commits: bytes = b"",
        missing: list[int] | None = None,
        problems: list[BatchProblem] | None = None,
    ) -> None:
        encoded = [msgspec.json.encode(problem).decode() for problem in problems or []]
        record = {
            "owner": spec.owner,
            "spec": msgspec.json.encode(spec),
            "next": 0,
            "chunks": 0,
            "committed": 0,
            "token": 0,
            **fields,
        }
        self._scripts(
            "restore",
            spec.id,
            msgspec.json.encode(spec.files_used),
            spec.created_at * 1000,
            spec.expires_at,
            int(terminal),
            commits,
            msgspec.json.encode(encoded),
            msgspec.json.encode(missing or []),
            *(part for pair in record.items() for part in pair),
        )

    def _stop_again(self, spec: BatchSpec, folder: Path) -> None:
        stop = read_json(folder / "stop.json")
        if stop is not None:
            self._scripts("stop", spec.id, stop["reason"])


def _fields(batch: Batch) -> dict[str, Any]:
    """The fields of the record of a batch that has ended."""
    values = msgspec.to_builtins(batch)
    skipped = {*BatchSpec.__struct_fields__, "problems", "counts", "seen_all"}
    fields = {
        name: int(value) if value is True else value
        for name, value in values.items()
        if value is not None and value is not False and name not in skipped
    }
    if batch.seen is not None:
        fields["seen_all"] = int(batch.seen_all)
    return {**fields, **_counts(batch.counts)}


def _counts(counts: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a record that count by reason."""
    return {f"{COUNT}{name}": by for name, by in counts.items()}


def _problems(folder: Path, known: list[BatchProblem]) -> list[BatchProblem]:
    found = known.copy()
    paths = (folder / "problems").glob("[0-9]*.json")
    for path in sorted(paths, key=lambda path: int(path.stem)):
        found += msgspec.convert(read_json(path), list[BatchProblem])
        if len(found) >= _MAX_PROBLEMS:
            break
    return found[:_MAX_PROBLEMS]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
