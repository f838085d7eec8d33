"""The store of batches: Redis holds what is live, ``batches/<id>/`` on shared storage the truth.

On disk: ``batch.json`` (what was asked), the manifest, ``shards/``, ``stop.json`` (a request to
stop) and ``final.json`` (how it ended). Each is written before Redis hears of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from shared.caption_sets import set_id
from shared.captions import CaptionSource
from shared.clock import unix_now
from shared.connection import PREFIX, Connection
from shared.errors import (
    IllegalTransition,
    InvalidValue,
    LeaseLost,
    NotFound,
    QueueUnavailable,
    SyncInProgress,
    VlmqError,
)
from shared.files import FileRecord
from shared.ids import is_id, new_id
from shared.jobs import Batch, BatchProblem, BatchSpec, BatchState, StopReason
from shared.leases import Lease
from shared.listing import problems_of
from shared.log import get_logger
from shared.manifest import Plan
from shared.paging import Page, ids_after
from shared.queue import Tickets
from shared.scripts import Scripts
from shared.shards import ShardHeader
from shared.storage import Layout, remove_tree, require_space, storage_errors, write_json

log = get_logger(__name__)

_WINDOW_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
_COMMIT = struct.Struct("<I")
COUNT = "count:"
"""What the fields of a batch's record begin with that count by reason (:mod:`shared.tally`)."""


def window_s(text: str) -> int:
    """The seconds of a completion window such as ``24h``, ``90m`` or ``7d``.

    Raises: InvalidValue for ``completion_window``.
    """
    number, unit = text[:-1], text[-1:]
    if unit in _WINDOW_UNITS_S and number.isascii() and number.isdigit() and len(number) <= 6:
        seconds = int(number) * _WINDOW_UNITS_S[unit]
        if seconds > 0:
            return seconds
    raise InvalidValue(
        "completion_window is a number of minutes, hours or days such as '24h'",
        param="completion_window",
    )


class BatchStore:
    """Create, read, list and stop batches, and record what workers did for them."""

    def __init__(
        self,
        client: Connection,
        scripts: Scripts,
        layout: Layout,
        tickets: Tickets,
        *,
        min_free_bytes: int,
    ) -> None:
        self._redis: Any = client
        self._tickets = tickets
        self._scripts = scripts
        self._layout = layout
        self._min_free_bytes = min_free_bytes

    # --- for the API ---

    def create(
        self,
        *,
        owner: str,
        input_file: FileRecord | None = None,
        source: CaptionSource | None = None,
        endpoint: str,
        completion_window: str,
        metadata: dict[str, str] | None,
        output_expires_after_s: int | None = None,
        retry_of: str | None = None,
    ) -> Batch:
        """Record a batch of a file or of an image set, and put it in line to be planned.

        Raises: StorageFull, QueueUnavailable; SyncInProgress if another one syncs this image set. Then
        nothing is left of it.
        """
        require_space(self._layout.batches, self._min_free_bytes)
        now = unix_now()
        spec = BatchSpec(
            id=new_id("batch_"),
            owner=owner,
            endpoint=endpoint,
            input_file_id=None if input_file is None else input_file.id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + window_s(completion_window),
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
            retry_of=retry_of,
            source=source,
        )
        folder = self.folder(spec.id)
        with storage_errors(folder):
            (folder / "shards").mkdir(mode=0o700, parents=True)
            (folder / "problems").mkdir(mode=0o700)
        try:
            write_json(folder / "batch.json", spec)
            self.enter(spec)
        except VlmqError:
            remove_tree(folder)  # should Redis have it all the same, planning will see it is gone
            raise
        self._announce()
        return self.get(owner, spec.id)

    def enter(self, spec: BatchSpec) -> None:
        """Put a recorded batch into Redis, to be planned. Does nothing if it is there already.

        Raises: SyncInProgress if another one syncs its image set.
        """
        encoded = msgspec.json.encode(spec)
        created_ms = spec.created_at * 1000
        other = self._scripts(
            "create",
            spec.id,
            spec.owner,
            encoded,
            created_ms,
            spec.expires_at,
            synced_set(spec),
            *spec.files_used,
        )
        if isinstance(other, bytes):
            raise SyncInProgress(
                f"the batch '{other.decode()}' is syncing this image set; wait until it has ended, or "
                "cancel it",
                param="sync",
            )

    def get(self, owner: str, batch_id: str) -> Batch:
        """The batch as it is now. Raises: NotFound, for somebody else's too."""
        if is_id(batch_id, "batch_"):
            [batch] = self._read([batch_id])
            if batch is not None and batch.owner == owner:
                return batch
        raise NotFound(f"there is no batch '{batch_id}'", param="batch_id")

    def committed_tokens(self, batch_id: str, first: int, limit: int) -> Sequence[int]:
        """The tokens of up to ``limit`` chunks from ``first`` on, up to one not committed.

        None once the batch has ended.
        """
        start, size = first * _COMMIT.size, limit * _COMMIT.size
        name = f"{PREFIX}batch:{batch_id}:commits"
        raw = self._redis.getrange(name, start, start + size - 1)
        tokens = (token for (token,) in _COMMIT.iter_unpack(raw))
        return [*takewhile(bool, tokens)]

    def list(self, owner: str, *, after: str | None = None, limit: int = 20) -> Page[Batch]:
        """The owner's batches, newest first. Raises: InvalidValue for an unknown ``after``."""
        index = f"{PREFIX}batches:{owner}"
        ids, has_more = ids_after(self._redis, index, after=after, limit=limit)
        return Page([batch for batch in self._read(ids) if batch is not None], has_more=has_more)

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Ask a batch to stop; what is done by then is kept.

        Raises: NotFound; IllegalTransition if it has ended.
        """
        batch = self.get(owner, batch_id)
        if batch.is_terminal:
            raise IllegalTransition(f"the batch is {batch.state} and cannot be cancelled")
        self.stop(batch_id, "cancelled")
        return self.get(owner, batch_id)

    def stop(self, batch_id: str, reason: StopReason) -> None:
        """Mark a batch to be stopped, on disk and then in Redis. Raises: IllegalTransition."""
        mark = self.folder(batch_id) / "stop.json"
        if not mark.exists():
            write_json(mark, {"reason": reason, "at": unix_now()})
        state = self._scripts("stop", batch_id, reason).decode()
        if state == "missing":
            raise NotFound(f"there is no batch '{batch_id}'")
        if state == "late":
            mark.unlink(missing_ok=True)  # it completes; a rebuild must not think otherwise
        elif state != "ok":
            raise IllegalTransition(f"the batch is {state} and cannot be {reason}")
        self._announce()

    def _announce(self) -> None:
        try:
            self._tickets.control()
        except QueueUnavailable:
            log.warning("ticket_not_published")  # the reaper publishes what is missing

    def folder(self, batch_id: str) -> Path:
        """Where its records are."""
        return self._layout.batch_dir(batch_id)

    # --- for the workers ---

    def planned(self, lease: Lease, plan: Plan) -> None:
        """The manifest is on disk: the chunks may be claimed. Raises: LeaseLost."""
        done = self._scripts(
            "planned", lease.batch_id, lease.token, plan.model, plan.chunks, plan.total
        )
        self._require(done, lease, {BatchState.IN_PROGRESS})

    def listed(self, lease: Lease, plan: Plan) -> None:
        """More of an image set is in its manifest: the chunks may be claimed. Raises: LeaseLost."""
        done = self._scripts(
            "listed",
            lease.batch_id,
            lease.token,
            plan.model,
            plan.chunks,
            plan.total,
            int(plan.complete),
            "" if plan.seen is None else plan.seen,
            "" if plan.seen is None else int(plan.seen_all),
            *_sync_counts(plan),
            *problems_of(plan),
        )
        if done:
            return
        batch = self.get(lease.spec.owner, lease.batch_id)
        if batch.listing or not plan.complete or batch.chunks != plan.chunks:
            raise LeaseLost()  # else only the answer was lost: this very plan counts

    def rejected(self, lease: Lease, total: int, problems: Sequence[BatchProblem]) -> None:
        """Nothing of the input can be run: the batch has failed. Raises: LeaseLost."""
        done = self._scripts(
            "rejected",
            lease.batch_id,
            lease.token,
            msgspec.json.encode(lease.spec.files_used),
            total,
            *(msgspec.json.encode(problem) for problem in problems),
        )
        self._require(done, lease, {BatchState.FAILED})
        self.write_final(lease.spec)

    def committed(
        self, lease: Lease, header: ShardHeader, problems: Sequence[BatchProblem]
    ) -> bool:
        """The chunk's shard is on disk; says whether it was the last one. Raises: LeaseLost."""
        if problems:
            write_json(self.folder(lease.batch_id) / "problems" / f"{lease.unit}.json", problems)
        done = self._scripts(
            "commit",
            lease.batch_id,
            lease.unit,
            lease.token,
            header.completed,
            header.failed,
            header.prompt_tokens,
            header.completion_tokens,
            header.images,
            msgspec.json.encode(header.counts),
            header.output_bytes,
            *(msgspec.json.encode(problem) for problem in problems),
        )
        if done is None:
            raise LeaseLost()
        return bool(done)

    def finished(
        self,
        lease: Lease,
        state: BatchState,
        *,
        output_file_id: str | None,
        error_file_id: str | None,
        completed: int,
        failed: int,
    ) -> None:
        """Output and error files are on disk: the batch has ended. Raises: LeaseLost."""
        done = self._scripts(
            "finish",
            lease.batch_id,
            lease.token,
            msgspec.json.encode(lease.spec.files_used),
            state.value,
            output_file_id or "",
            error_file_id or "",
            completed,
            failed,
        )
        self._require(done, lease, {state})
        self.write_final(lease.spec)

    def is_recorded(self, spec: BatchSpec) -> bool:
        """Whether the batch is on shared storage, which is what makes it exist."""
        return (self.folder(spec.id) / "batch.json").exists()

    def write_final(self, spec: BatchSpec) -> None:
        """Record on disk how the batch ended."""
        if not self.is_recorded(spec):
            return
        write_json(self.folder(spec.id) / "final.json", self.get(spec.owner, spec.id))

    def commits(self, lease: Lease) -> Sequence[tuple[int, int]]:
        """Each committed chunk with the token of its shard, in the chunks' order.

        Read in one step with the lease: a finalizer that was overtaken must not take the list,
        which is gone by then, for an empty one. Raises: LeaseLost.
        """
        name = f"{PREFIX}batch:{lease.batch_id}"
        pipeline = self._redis.pipeline()
        pipeline.get(f"{name}:commits")
        pipeline.hget(f"{name}:leases", lease.unit)
        raw, holder = pipeline.execute()
        if holder is None or int(holder.split()[0]) != lease.token:
            raise LeaseLost()
        tokens = enumerate(_COMMIT.iter_unpack(raw or b""))
        return [(index, token) for index, (token,) in tokens if token]

    def overdue(self) -> Sequence[str]:
        """Batches whose completion window has ended."""
        found = self._redis.zrangebyscore(f"{PREFIX}deadlines", "-inf", unix_now())
        return [bytes(member).decode() for member in found]

    def ended_before(self, unix_s: int) -> Sequence[Batch]:
        """Batches that ended before that, and that no live fine-tune reads."""
        ids = self._redis.zrangebyscore(f"{PREFIX}ended", "-inf", f"({unix_s}")
        found = self._read([bytes(batch_id).decode() for batch_id in ids])
        return [batch for batch in found if batch is not None and not self._is_used(batch)]

    def _is_used(self, batch: Batch) -> bool:
        return bool(self._redis.scard(f"{PREFIX}users:{batch.id}"))

    def remove(self, batch: Batch) -> None:
        """Forget a batch that has ended, in Redis and then on disk."""
        name = f"{PREFIX}batch:{batch.id}"
        pipeline = self._redis.pipeline()
        pipeline.delete(name, f"{name}:problems", f"{name}:events", f"{name}:commits")
        pipeline.zrem(f"{PREFIX}batches:{batch.owner}", batch.id)
        pipeline.zrem(f"{PREFIX}ended", batch.id)
        pipeline.execute()
        remove_tree(self.folder(batch.id))

    def _require(self, done: object, lease: Lease, reached: set[BatchState]) -> None:
        """A step that was refused has been done after all if only its answer was lost."""
        if not done and self.get(lease.spec.owner, lease.batch_id).state not in reached:
            raise LeaseLost()

    def _read(self, ids: Sequence[str]) -> Sequence[Batch | None]:
        pipeline = self._redis.pipeline(transaction=False)
        for batch_id in ids:
            pipeline.hgetall(f"{PREFIX}batch:{batch_id}")
            pipeline.lrange(f"{PREFIX}batch:{batch_id}:problems", 0, -1)
        rows = pipeline.execute()
        return [
            _decode(fields, problems) if fields else None
            for fields, problems in zip(rows[::2], rows[1::2], strict=True)
        ]


def synced_set(spec: BatchSpec) -> str:
    """The set that a batch syncs, or else nothing."""
    if spec.source is None or spec.source.sync is None:
        return ""
    return set_id(spec.owner, spec.source)


def _sync_counts(plan: Plan) -> tuple[int, int, int]:
    if plan.sync is None:
        return 0, 0, 0
    return plan.sync.known, plan.sync.duplicates, plan.sync.passed


def _decode(fields: dict[bytes, bytes], problems: Sequence[bytes]) -> Batch:
    texts = {name.decode(): value.decode() for name, value in fields.items() if value != b""}
    spec = msgspec.json.decode(texts["spec"], type=dict)
    known: dict[str, Any] = {name: texts[name] for name in texts if name in Batch.__struct_fields__}
    known["problems"] = [msgspec.json.decode(problem) for problem in problems]
    known["counts"] = {
        name.removeprefix(COUNT): by for name, by in texts.items() if name.startswith(COUNT)
    }
    return msgspec.convert({**known, **spec}, Batch, strict=False)
