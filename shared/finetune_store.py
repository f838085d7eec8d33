"""The store of fine-tunes: Redis holds what is live, ``finetunes/<id>/`` on shared storage the truth.

The owner creates a job and says what is wanted of it; workers claim it under a lease, keep the lease
by renewing it, and say how it goes. What is said is on disk (``shared.finetune_folder``) before
Redis hears of it, so after a lost Redis ``shared.rebuild`` finds everything.

A lease cannot stop a paused worker. Hence every effect carries the lease's fencing token: Redis
refuses one that is not the present one, and on disk each token has files of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.clock import unix_now
from shared.connection import PREFIX, Connection
from shared.errors import (
    IllegalTransition,
    InvalidValue,
    LeaseLost,
    NotFound,
    QueueUnavailable,
    StorageFailed,
    StorageFull,
    VlmqError,
)
from shared.finetune_folder import Conversion, FinetuneFolder, StoredEvent, Wish
from shared.finetunes import (
    FINETUNE_TRANSITIONS,
    EventLevel,
    Finetune,
    FinetuneCheckpoint,
    FinetuneEvent,
    FinetuneSpec,
    FinetuneState,
    Wanted,
)
from shared.ids import is_id
from shared.jobs import Batch
from shared.learnable import files_learned_from
from shared.log import get_logger
from shared.paging import Page, ids_after
from shared.queue import Tickets
from shared.scripts import Scripts
from shared.storage import Layout, read_json, remove_tree, require_space

log = get_logger(__name__)

FinetuneWork = Literal["validate", "train", "checkpoint"]

STEP_SECONDS = "step_seconds"
"""Where a metrics event's data says how long a training step takes now."""

_JOB = "job"
_HAND_BACK_MS = 5000
_RESENT_AT_ONCE = 1000  # a long training's events in one script would hold Redis up
_PLAIN = ("state", "wanted", "stage", "waiting_for")
_PLAIN_NUMBERS = ("attempts", "token", "finished_at")
_NOT_FOR_HOLDERS = {*FinetuneSpec.__struct_fields__, "state", "wanted", "token", "finished_at"}


class FinetuneLease(msgspec.Struct, frozen=True):
    """A job, or the conversion of one of its checkpoints, held by a worker under a token.

    ``job`` is the record as it was when it was claimed. ``attempts`` is how many workers died or
    gave up before; ``step`` is the checkpoint's, for the kind ``checkpoint``.
    """

    kind: FinetuneWork
    job: Finetune
    token: int
    worker: str
    attempts: int
    step: int | None = None

    @property
    def job_id(self) -> str:
        """The job that this is of."""
        return self.job.id

    @property
    def unit(self) -> str:
        """What is held: the job, or a checkpoint."""
        return _JOB if self.step is None else str(self.step)


class NewEvent(msgspec.Struct, frozen=True):
    """An event to be added. Metrics carry ``step`` in their data and count once for each step."""

    message: str
    level: EventLevel = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = {}
    at_ms: int = msgspec.field(default_factory=lambda: int(time.time() * 1000))


class _Unsent(msgspec.Struct, frozen=True):
    """What a holder has on disk that Redis has not acknowledged.

    ``acknowledged_bytes`` of its file of events come before ``events``; ``to`` is a new state;
    ``acknowledged`` is the record as it was before.
    """

    acknowledged: dict[str, Any] | None
    events: list[StoredEvent] = []
    acknowledged_bytes: int = 0
    to: FinetuneState | None = None


class FinetuneStore:
    """Create, read and steer fine-tunes, and record what workers do for them.

    Every method may raise QueueUnavailable when Redis does not answer; those that write also
    StorageFull and StorageFailed.
    """

    def __init__(
        self,
        client: Connection,
        scripts: Scripts,
        layout: Layout,
        tickets: Tickets,
        *,
        ttl_s: float,
        min_free_bytes: int,
    ) -> None:
        self._redis: Any = client
        self._scripts = scripts
        self._layout = layout
        self._tickets = tickets
        self._ttl_ms = int(ttl_s * 1000)
        self._min_free_bytes = min_free_bytes
        self._unsent: dict[tuple[str, int], _Unsent] = {}
        self._unsent_lock = threading.Lock()

    # --- for the API ---

    def create(self, spec: FinetuneSpec) -> Finetune:
        """Record a job and put it in line to be validated.

        Raises: StorageFull, StorageFailed, QueueUnavailable (then nothing is left of it).
        """
        require_space(self._layout.finetunes, self._min_free_bytes)
        event = _stored(NewEvent("Created; its data waits to be checked"), key="created")
        folder = FinetuneFolder(self.path(spec.id))
        try:
            folder.create(spec, event)
            self.enter(spec, event)
        except VlmqError:
            remove_tree(folder.path)
            raise
        self._announce()
        return self.get(spec.owner, spec.id)

    def enter(self, spec: FinetuneSpec, event: StoredEvent) -> None:
        """Put a recorded job into Redis, to be validated. Does nothing if it is there already."""
        self._scripts("ft_create", *_spec_args(spec, self._layout), *_event_args(event))

    def get(self, owner: str, job_id: str) -> Finetune:
        """The job as it is now. Raises: NotFound, for somebody else's too; QueueUnavailable."""
        if is_id(job_id, "ftjob-"):
            [found] = self._read([job_id])
            if found is not None and found.owner == owner:
                return found
        raise NotFound(f"there is no fine-tuning job '{job_id}'", param="fine_tuning_job_id")

    def list(
        self,
        owner: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
    ) -> Page[Finetune]:
        """The owner's jobs, newest first; with ``metadata``, those that have all its pairs.

        Raises: InvalidValue for an unknown ``after``; QueueUnavailable.
        """
        index = f"{PREFIX}finetunes:{owner}"
        wanted = (metadata or {}).items()
        found: list[Finetune] = []
        has_more = True
        while has_more and len(found) <= limit:
            ids, has_more = ids_after(self._redis, index, after=after, limit=limit)
            if not ids:
                break
            after = ids[-1]
            jobs = [job for job in self._read(ids) if job is not None]
            found += [job for job in jobs if wanted <= (job.metadata or {}).items()]
        return Page(found[:limit], has_more=len(found) > limit or has_more)

    def want(self, owner: str, job_id: str, wanted: Wanted) -> Finetune:
        """Say what shall become of a job: ``pause``, ``run`` (resume) or ``cancel``.

        A job that nobody holds follows at once; a worker that holds it hears of it with its next
        renewal and stops at a checkpoint. To want what is wanted already changes nothing.

        Raises: NotFound; IllegalTransition if the job has ended or is being cancelled; StorageFull,
        StorageFailed, QueueUnavailable.
        """
        job = self.get(owner, job_id)
        if job.wanted == wanted and (not job.is_terminal or wanted == "cancel"):
            return job
        if job.is_terminal or job.wanted == "cancel":
            raise _too_late(job, wanted)
        folder = FinetuneFolder(self.path(job_id))
        wish = Wish(wanted, unix_now())
        folder.write_wish(wish)
        answer, *told = self._scripts("ft_want", job_id, wanted, wish.at)
        if answer == b"missing":
            raise NotFound(f"there is no fine-tuning job '{job_id}'", param="fine_tuning_job_id")
        now = self.get(owner, job_id)
        if answer == b"refused":
            if wanted == "cancel":
                folder.withdraw_cancel()
            raise _too_late(now, wanted)
        self._write_told(job_id, told)
        self._announce()
        return now

    def events(
        self, owner: str, job_id: str, *, after: int | None = None, limit: int = 20
    ) -> Page[FinetuneEvent]:
        """What happened, newest first: up to ``limit`` events with numbers below ``after``.

        Raises: NotFound; InvalidValue for an ``after`` that is no event's number; QueueUnavailable.
        """
        self.get(owner, job_id)
        name = f"{PREFIX}finetune:{job_id}:events"
        total = int(self._redis.llen(name))
        if after is not None and not 1 <= after <= total:
            raise InvalidValue(f"there is no event with the number {after}", param="after")
        end = total if after is None else after - 1
        start = max(0, end - limit)
        rows = self._redis.lrange(name, start, end - 1) if end else []
        found = [_event(number, row) for number, row in enumerate(rows, start + 1)]
        return Page(found[::-1], has_more=start > 0)

    def request_checkpoint(self, owner: str, job_id: str, step: int) -> FinetuneCheckpoint:
        """Have the checkpoint of ``step`` converted and served; asking again changes nothing.

        One whose conversion failed is tried again.

        Raises: NotFound if there is no such job or checkpoint; StorageFull, StorageFailed,
        QueueUnavailable.
        """
        checkpoint = self._checkpoint(owner, job_id, step)
        if checkpoint.conversion in ("requested", "served"):
            return checkpoint
        conversion = Conversion(step, unix_now())
        FinetuneFolder(self.path(job_id)).write_conversion(conversion)
        self._scripts("ft_serve", job_id, step, msgspec.json.encode(conversion))
        self._announce()
        return self._checkpoint(owner, job_id, step)

    def forget_checkpoint(self, owner: str, job_id: str, model: str) -> None:
        """The checkpoint that is served as ``model`` shall be no more; it may be asked for again.

        Does nothing if no checkpoint is. Raises: NotFound, StorageFailed, QueueUnavailable.
        """
        folder = FinetuneFolder(self.path(job_id))
        for checkpoint in self.get(owner, job_id).checkpoints:
            if checkpoint.model == model:
                folder.remove_conversion(checkpoint.step)
                self._redis.hdel(f"{PREFIX}finetune:{job_id}:served", checkpoint.step)

    def path(self, job_id: str) -> Path:
        """Where its records, data and checkpoints are."""
        return self._layout.finetune_dir(job_id)

    # --- for the workers ---

    def claim(self, kind: FinetuneWork, worker: str, gpus: int = 0) -> FinetuneLease | None:
        """Take the next job to validate or train, or checkpoint to convert; owners take turns.

        A job whose ``recipe.gpus`` exceeds ``gpus`` is passed over; a worker without GPUs may
        train those that need one. The state stays: ``move`` makes it ``running``.

        Raises: QueueUnavailable, StorageFull, StorageFailed (the job is given back).
        """
        found = self._scripts("ft_claim", f"finetune/{kind}", worker, self._ttl_ms, gpus)
        if found is None:
            return None
        job_id, unit, token, attempts = bytes(found[0]).decode(), found[1], found[2], found[3]
        [job] = self._read([job_id])
        if job is None:
            return None  # removed in this very moment
        step = None if unit == _JOB.encode() else int(unit)
        lease = FinetuneLease(kind, job, token, worker, attempts, step)
        if step is not None:
            return lease
        if not FinetuneFolder(self.path(job_id)).exists():
            self._forget(lease)
            return self.claim(kind, worker, gpus)
        return self._taken_over(lease)

    def renew(self, lease: FinetuneLease) -> Wanted:
        """Hold on for another TTL; says what is wanted of the job by now.

        Raises: LeaseLost, QueueUnavailable (the work goes on, and the next try may succeed).
        """
        answer = self._scripts("ft_renew", lease.job_id, lease.unit, lease.token, self._ttl_ms)
        if answer is None:
            raise LeaseLost()
        wanted: Wanted = msgspec.convert(bytes(answer).decode(), Wanted)
        return wanted

    def move(
        self,
        lease: FinetuneLease,
        to: FinetuneState,
        *,
        message: str,
        level: EventLevel = "info",
        data: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        """Change the job's state, with the event that says so and any ``fields`` of the record.

        To ``running`` the lease is kept; every other state ends it. ``paused`` becomes ``queued`` again
        at once if the owner resumed the job meanwhile. May be repeated after QueueUnavailable.

        Raises: LeaseLost; IllegalTransition if the table of states has no such step; TypeError for a
        field that is not a holder's to change, ValidationError for a value of the wrong type;
        StorageFull, StorageFailed, QueueUnavailable.
        """
        record = self._own(lease)
        if to != record.state and to not in FINETUNE_TRANSITIONS[record.state]:
            raise IllegalTransition(f"a fine-tune that is {record.state} cannot become {to}")
        fields = {"waiting_for": None, **fields}
        at = unix_now()
        if to == FinetuneState.RUNNING and record.started_at is None:
            fields.setdefault("started_at", at)
        changed = _changed(record, fields)
        is_over = not FINETUNE_TRANSITIONS[to]
        changed = msgspec.structs.replace(
            changed, state=to, finished_at=(record.finished_at or at) if is_over else None
        )
        event = _stored(NewEvent(message, level, data=data or {}), key=f"state:{lease.token}:{to}")
        self._update(lease, changed, [event], to=to, lets_go=to != FinetuneState.RUNNING)

    def note(self, lease: FinetuneLease, **fields: Any) -> None:
        """Change fields of the record: stage, progress, checkpoints, attempts and so on.

        What was noted while Redis was away reaches it with the next call.

        Raises: LeaseLost; TypeError for a field that is not a holder's to change, ValidationError for
        a value of the wrong type; StorageFull, StorageFailed, QueueUnavailable.
        """
        self._update(lease, _changed(self._own(lease), fields), [])

    def add_events(self, lease: FinetuneLease, events: Iterable[NewEvent]) -> None:
        """Add events. The same metrics step, or the same message of the same moment, counts once.

        After QueueUnavailable they are on disk and reach Redis with the next call; to add them again
        does no harm. Raises: LeaseLost, StorageFull, StorageFailed, QueueUnavailable.
        """
        self._update(lease, self._own(lease), [_stored(event) for event in events])

    def release(
        self,
        lease: FinetuneLease,
        *,
        delay_s: float = 0,
        waiting_for: str | None = None,
        counts: bool = False,
        message: str | None = None,
        level: EventLevel = "info",
    ) -> None:
        """Give the job or checkpoint back unfinished; it may be claimed again after ``delay_s``.

        A running job is queued again. ``waiting_for`` says why, to people; ``counts`` adds one to its
        attempts; ``message`` becomes an event. A lease that was lost is none to give back: no error.
        On a full disk Redis alone is told.

        Raises: StorageFailed if the record cannot be read, QueueUnavailable (the lease then expires by
        itself).
        """
        delay_ms = int(delay_s * 1000)
        if lease.step is not None:
            self._scripts(
                "ft_give_back", lease.job_id, lease.step, lease.token, delay_ms, int(counts)
            )
        else:
            try:
                self._release_job(lease, delay_ms, waiting_for, message, level, counts=counts)
            except LeaseLost:
                log.info("lease_was_lost", job_id=lease.job_id, token=lease.token)
        self._announce()

    def finish_checkpoint(
        self, lease: FinetuneLease, *, model: str | None = None, error: str | None = None
    ) -> None:
        """A checkpoint is served as ``model``, or cannot be, which ``error`` explains to people.

        Raises: LeaseLost, StorageFull, StorageFailed, QueueUnavailable.
        """
        assert lease.step is not None, "not the lease of a checkpoint"
        conversion = Conversion(lease.step, unix_now(), model, error)
        message = f"The checkpoint of step {lease.step} is served as {model}"
        if error is not None:
            message = f"The checkpoint of step {lease.step} cannot be served: {error}"
        event = _stored(
            NewEvent(message, "info" if error is None else "error"),
            key=f"checkpoint:{lease.step}:{lease.token}",
        )
        folder = FinetuneFolder(self.path(lease.job_id))
        if self._scripts("ft_renew", lease.job_id, lease.unit, lease.token, self._ttl_ms) is None:
            raise LeaseLost()
        folder.write_event(event)
        folder.write_conversion(conversion)
        done = self._scripts(
            "ft_served",
            lease.job_id,
            lease.step,
            lease.token,
            msgspec.json.encode(conversion),
            *_event_args(event),
        )
        if done is None:
            raise LeaseLost()

    # --- for the reaper ---

    def reap(self, dead_workers: Sequence[str] = ()) -> Sequence[str]:
        """Take back expired leases and those of ``dead_workers``; names what was taken.

        A job's attempts grow by one; what its owner wants of it comes true.
        Raises: QueueUnavailable.
        """
        taken = []
        for job_id, unit, *told in self._scripts("ft_reap", *dead_workers):
            taken.append(f"{bytes(job_id).decode()}|{bytes(unit).decode()}")
            try:
                self._write_told(bytes(job_id).decode(), told)
            except (StorageFull, StorageFailed) as error:
                # What was taken is free in Redis; only the events are missing after a rebuild.
                log.error("event_not_written", unit=taken[-1], error=str(error))  # noqa: TRY400
        return taken

    def demand(self, *, limit: int) -> int:
        """How many jobs and checkpoints could be claimed right now, counted up to ``limit``."""
        return int(self._scripts("ft_demand", limit))

    # --- for rebuilding and retention ---

    def recorded(self, job_id: str) -> Finetune | None:
        """The job as shared storage has it, when nobody holds it; ``None`` if it was never whole.

        Raises: StorageFailed, ValidationError for a damaged file.
        """
        folder = FinetuneFolder(self.path(job_id))
        spec = folder.spec()
        if spec is None:
            return None
        fresh = Finetune(**msgspec.structs.asdict(spec), state=FinetuneState.VALIDATING_FILES)
        left = folder.read_state(folder.latest_token()) or {}
        return _settled(_from_disk(fresh, left), folder.wish())

    def restore(self, job: Finetune, *, token: int) -> Sequence[str]:
        """Put a recorded job back into Redis, where it counts its tokens on from ``token``.

        Does nothing if it is there. Answers with events that could not be read.
        Raises: StorageFailed, ValidationError for a damaged file, QueueUnavailable.
        """
        folder = FinetuneFolder(self.path(job.id))
        spec = msgspec.convert(msgspec.to_builtins(job), FinetuneSpec)
        conversions = folder.conversions()
        events, damaged = folder.events()
        self._scripts(
            "ft_restore",
            *_spec_args(spec, self._layout),
            *_record_args(job),
            job.state.value,
            job.wanted,
            job.finished_at or "",
            job.token + token,
            len(conversions),
            *(part for conversion in conversions for part in _conversion_args(conversion)),
            *(part for event in events for part in _event_args(event)),
        )
        return damaged

    def ended_before(self, unix_s: int) -> Sequence[Finetune]:
        """Jobs that ended before that, none of whose checkpoints is about to be converted."""
        ids = self._redis.zrangebyscore(f"{PREFIX}finetunes_ended", "-inf", f"({unix_s}")
        found = self._read([bytes(job_id).decode() for job_id in ids])
        return [job for job in found if job is not None and not _is_converting(job)]

    def remove(self, job: Finetune) -> None:
        """Forget a job that has ended, in Redis and then on disk, checkpoints and all.

        Raises: StorageFailed, QueueUnavailable.
        """
        name = f"{PREFIX}finetune:{job.id}"
        parts = ("events", "seen", "served", "tries", "delays", "leases")
        pipeline = self._redis.pipeline()
        pipeline.delete(name, *(f"{name}:{part}" for part in parts))
        pipeline.zrem(f"{PREFIX}finetunes:{job.owner}", job.id)
        pipeline.zrem(f"{PREFIX}finetunes_ended", job.id)
        pipeline.execute()
        remove_tree(self.path(job.id))

    # --- inside ---

    def _taken_over(self, lease: FinetuneLease) -> FinetuneLease:
        """Begin a state file under the new token, from what the last holder left.

        The last holder may have written more than Redis has heard, so its file goes before Redis in
        all that only holders change; its events are sent once more.
        """
        folder = FinetuneFolder(self.path(lease.job_id))
        try:
            before = folder.latest_token(below=lease.token)
            left = folder.read_state(before)
            job = lease.job if left is None else _kept(lease.job, left)
            folder.write_state(lease.token, _to_disk(job))
            folder.prune_states(lease.token)
            lease = msgspec.structs.replace(lease, job=job)
            self._update(lease, job, [])
            told = folder.events_of(before)
            for start in range(0, len(told), _RESENT_AT_ONCE):
                some = told[start : start + _RESENT_AT_ONCE]
                self._script_update(lease, job, lets_go=False, events=some)
        except (VlmqError, msgspec.ValidationError):
            self._hand_back(lease)
            raise
        return lease

    def _release_job(
        self,
        lease: FinetuneLease,
        delay_ms: int,
        waiting_for: str | None,
        message: str | None,
        level: EventLevel,
        *,
        counts: bool,
    ) -> None:
        record = self._own(lease)
        to = FinetuneState.QUEUED if record.state == FinetuneState.RUNNING else None
        changed = msgspec.structs.replace(
            record,
            state=to or record.state,
            waiting_for=waiting_for,
            attempts=record.attempts + int(counts),
        )
        event = NewEvent(message or "Interrupted; it goes on from its last checkpoint", level)
        events = [_stored(event, key=f"released:{lease.token}")] if message or to else []
        try:
            self._update(lease, changed, events, to=to, lets_go=True, delay_ms=delay_ms)
        except (StorageFull, StorageFailed) as error:
            # A rebuild makes the same of the record that is there: the lease need not expire.
            log.warning("released_without_record", job_id=lease.job_id, error=str(error))
            answer = self._script_update(lease, changed, to=to, delay_ms=delay_ms, events=events)
            if answer is None:
                raise LeaseLost() from error

    def _forget(self, lease: FinetuneLease) -> None:
        """Drop a job that has no folder: its creation failed after Redis had heard of it."""
        log.error("finetune_without_folder", job_id=lease.job_id)
        self._script_update(lease, lease.job, to=FinetuneState.FAILED)
        self.remove(lease.job)

    def _hand_back(self, lease: FinetuneLease) -> None:
        """Let go of a job as it was, for it could not be taken over."""
        self._script_update(lease, lease.job, delay_ms=_HAND_BACK_MS)

    def _script_update(
        self,
        lease: FinetuneLease,
        record: Finetune,
        *,
        to: FinetuneState | None = None,
        lets_go: bool = True,
        delay_ms: int = 0,
        step_s: str = "",
        events: Sequence[StoredEvent] = (),
    ) -> Any:
        """What ``ft_update`` answers: None for a lost lease, a word, or texts of events."""
        return self._scripts(
            "ft_update",
            lease.job_id,
            lease.token,
            to.value if to else "",
            int(lets_go),
            delay_ms,
            record.finished_at or unix_now(),
            *_record_args(record),
            step_s,
            *(part for event in events for part in _event_args(event)),
        )

    def _own(self, lease: FinetuneLease) -> Finetune:
        """The record as this lease's holder left it on disk."""
        assert lease.step is None, "the lease of a checkpoint changes no job"
        left = FinetuneFolder(self.path(lease.job_id)).read_state(lease.token)
        if left is None:
            raise LeaseLost()  # pruned by a later holder
        return _from_disk(lease.job, left)

    def _update(
        self,
        lease: FinetuneLease,
        record: Finetune,
        events: Sequence[StoredEvent],
        *,
        to: FinetuneState | None = None,
        lets_go: bool = False,
        delay_ms: int = 0,
    ) -> None:
        """Write a record and events down, then tell Redis in one step.

        A step that Redis did not hear of is done with the next one: it is on disk already.
        """
        folder = FinetuneFolder(self.path(lease.job_id))
        before = folder.read_state(lease.token)
        unsent = self._written(folder, lease, record, events, to)
        lets_go = lets_go or unsent.to not in (None, FinetuneState.RUNNING)
        answer = self._script_update(
            lease,
            record,
            to=unsent.to,
            lets_go=lets_go,
            delay_ms=delay_ms,
            step_s=_step_seconds(unsent.events),
            events=unsent.events,
        )
        with self._unsent_lock:
            self._unsent.pop((lease.job_id, lease.token), None)
        if answer == b"done":  # by an earlier call whose answer was lost, or that was forgotten
            if before is not None:
                folder.write_state(lease.token, before)
            return
        if answer is None or answer == b"refused":
            # A rebuild must not take what was refused for what happened.
            if unsent.events:
                folder.truncate_events(lease.token, unsent.acknowledged_bytes)
            if unsent.acknowledged is not None:
                folder.write_state(lease.token, unsent.acknowledged)
            if answer is None:
                raise LeaseLost()
            raise IllegalTransition(f"the fine-tune cannot become {unsent.to}")
        self._write_told(lease.job_id, answer)
        if lets_go:
            self._announce()

    def _written(
        self,
        folder: FinetuneFolder,
        lease: FinetuneLease,
        record: Finetune,
        events: Sequence[StoredEvent],
        to: FinetuneState | None,
    ) -> _Unsent:
        """Write both down, or neither; answers all that Redis has not acknowledged."""
        mine = (lease.job_id, lease.token)
        with self._unsent_lock:
            unsent = self._unsent.get(mine)
        if unsent is None:
            unsent = _Unsent(acknowledged=folder.read_state(lease.token))
        known = {event.key for event in unsent.events}
        new = [event for event in events if event.key not in known]
        length = folder.append_events(lease.token, new) if new else 0
        try:
            folder.write_state(lease.token, _to_disk(record))
        except (StorageFull, StorageFailed):
            if new:
                folder.truncate_events(lease.token, length)
            raise
        unsent = _Unsent(
            acknowledged=unsent.acknowledged,
            events=[*unsent.events, *new],
            acknowledged_bytes=unsent.acknowledged_bytes if unsent.events else length,
            to=to or unsent.to,
        )
        with self._unsent_lock:
            self._unsent[mine] = unsent
        return unsent

    def _write_told(self, job_id: str, told: Sequence[bytes]) -> None:
        """Write down the events that a script added."""
        folder = FinetuneFolder(self.path(job_id))
        for event in told:
            folder.write_event(msgspec.json.decode(event, type=StoredEvent))

    def _checkpoint(self, owner: str, job_id: str, step: int) -> FinetuneCheckpoint:
        for checkpoint in self.get(owner, job_id).checkpoints:
            if checkpoint.step == step:
                return checkpoint
        raise NotFound(
            f"'{job_id}' has no checkpoint of step {step}", param="fine_tuning_checkpoint_id"
        )

    def _announce(self) -> None:
        try:
            self._tickets.finetune()
        except QueueUnavailable:
            log.warning("ticket_not_published")  # the reaper publishes what is missing

    def _read(self, ids: Sequence[str]) -> Sequence[Finetune | None]:
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hgetall(f"{PREFIX}finetune:{job_id}")
            pipeline.hvals(f"{PREFIX}finetune:{job_id}:served")
        rows = pipeline.execute()
        return [
            _decode(fields, served) if fields else None
            for fields, served in zip(rows[::2], rows[1::2], strict=True)
        ]


def used_by(spec: FinetuneSpec, layout: Layout) -> list[str]:
    """Ids of the files and batches that a job reads; they stay until it has ended."""
    data = spec.data
    named = (data.training_file, data.validation_file, data.images, spec.config_file)
    found = {name for name in named if name and is_id(name, "file-")}
    for name in (data.training_file, data.validation_file):
        if name is not None and is_id(name, "batch_"):
            found.add(name)
            final = read_json(layout.batch_dir(name) / "final.json")
            if final is not None:
                found.update(files_learned_from(msgspec.convert(final, Batch)))
    return sorted(found)


def _stored(event: NewEvent, *, key: str | None = None) -> StoredEvent:
    if key is None and event.type == "metrics":
        key = f"metrics:{event.data['step']}"
    key = key or f"message:{event.at_ms}:{event.message}"
    return StoredEvent(key, event.at_ms, event.level, event.type, event.message, event.data)


def _event(number: int, row: bytes) -> FinetuneEvent:
    stored = msgspec.json.decode(row, type=StoredEvent)
    return FinetuneEvent(
        number, stored.at_ms // 1000, stored.level, stored.type, stored.message, stored.data
    )


def _step_seconds(events: Sequence[StoredEvent]) -> str:
    """How long a step takes by the newest event that says so; empty if none does."""
    found = [event.data[STEP_SECONDS] for event in events if STEP_SECONDS in event.data]
    return f"{found[-1]:.6f}" if found else ""


def _changed(record: Finetune, fields: dict[str, Any]) -> Finetune:
    """The record with some fields replaced, checked.

    Raises: TypeError, ValidationError.
    """
    strange = _NOT_FOR_HOLDERS & fields.keys()
    if strange:
        raise TypeError(f"{', '.join(sorted(strange))} cannot be changed by a holder")
    changed = msgspec.structs.replace(record, **fields)
    return msgspec.convert(msgspec.to_builtins(changed), Finetune)


def _to_disk(record: Finetune) -> dict[str, Any]:
    """A record without what was asked for, which is on disk, and without the owner's wish."""
    skipped = {*FinetuneSpec.__struct_fields__, "wanted"}
    values = msgspec.to_builtins(record)
    return {name: value for name, value in values.items() if name not in skipped}


def _from_disk(job: Finetune, left: dict[str, Any]) -> Finetune:
    """``job`` with everything that a state file says."""
    return msgspec.convert({**msgspec.to_builtins(job), **left}, Finetune)


def _kept(job: Finetune, left: dict[str, Any]) -> Finetune:
    """``job`` as Redis has it, with what only holders change as the last of them left it."""
    from_redis = {*_PLAIN, *_PLAIN_NUMBERS} - {"stage"}
    return _from_disk(job, {name: left[name] for name in left if name not in from_redis})


def _record_args(record: Finetune) -> tuple[bytes, str, int, str]:
    """A record as the script ``ft_update`` takes it."""
    plain = {*_PLAIN, *_PLAIN_NUMBERS}
    noted = {name: value for name, value in _to_disk(record).items() if name not in plain}
    return (msgspec.json.encode(noted), record.stage, record.attempts, record.waiting_for or "")


def _spec_args(spec: FinetuneSpec, layout: Layout) -> tuple[str | int | bytes, ...]:
    """What was asked, as the scripts take it that enter a job."""
    return (
        spec.id,
        spec.owner,
        msgspec.json.encode(spec),
        spec.created_at * 1000,
        spec.recipe.gpus,
        msgspec.json.encode(used_by(spec, layout)),
    )


def _event_args(event: StoredEvent) -> tuple[str, bytes]:
    return event.key, msgspec.json.encode(event)


def _conversion_args(conversion: Conversion) -> tuple[int, bytes, int]:
    waits = conversion.model is None and conversion.error is None
    return conversion.step, msgspec.json.encode(conversion), int(waits)


def _settled(job: Finetune, wish: Wish | None) -> Finetune:
    """A job that nobody holds, as its owner wants it; what ``ft_settle`` does in Redis.

    What it waited for is not known any more; whoever looks at it next will say.
    """
    wanted: Wanted = "run" if wish is None else wish.wanted
    job = msgspec.structs.replace(job, wanted=wanted, waiting_for=None)
    if job.is_terminal:
        return job
    if wanted == "cancel" and wish is not None:
        return msgspec.structs.replace(job, state=FinetuneState.CANCELLED, finished_at=wish.at)
    if wanted == "pause":
        return msgspec.structs.replace(job, state=FinetuneState.PAUSED)
    at_start = FinetuneState.VALIDATING_FILES
    is_unchecked = job.state == at_start or (job.state == "paused" and job.stage == "validate")
    return msgspec.structs.replace(job, state=at_start if is_unchecked else FinetuneState.QUEUED)


def _is_converting(job: Finetune) -> bool:
    return any(checkpoint.conversion == "requested" for checkpoint in job.checkpoints)


def _decode(fields: dict[bytes, bytes], served: Sequence[bytes]) -> Finetune:
    texts = {name.decode(): value for name, value in fields.items()}
    values = {
        **msgspec.json.decode(texts["record"]),
        **msgspec.json.decode(texts["spec"]),
        **{name: texts[name].decode() for name in _PLAIN if texts.get(name)},
        **{name: int(texts[name]) for name in _PLAIN_NUMBERS if texts.get(name)},
    }
    job = msgspec.convert(values, Finetune)
    conversions = [msgspec.json.decode(row, type=Conversion) for row in served]
    return msgspec.structs.replace(job, checkpoints=_with_conversions(job.checkpoints, conversions))


def _with_conversions(
    checkpoints: Sequence[FinetuneCheckpoint], conversions: Sequence[Conversion]
) -> list[FinetuneCheckpoint]:
    by_step = {conversion.step: conversion for conversion in conversions}
    found = []
    for checkpoint in checkpoints:
        conversion = by_step.get(checkpoint.step)
        found.append(checkpoint if conversion is None else _converted(checkpoint, conversion))
    return found


def _converted(checkpoint: FinetuneCheckpoint, conversion: Conversion) -> FinetuneCheckpoint:
    state = "served" if conversion.model else "failed" if conversion.error else "requested"
    return msgspec.structs.replace(checkpoint, model=conversion.model, conversion=state)


def _too_late(job: Finetune, wanted: Wanted) -> IllegalTransition:
    words = {"run": "resumed", "pause": "paused", "cancel": "cancelled"}
    state = job.state if job.is_terminal else "being cancelled"
    return IllegalTransition(f"the fine-tuning job is {state} and cannot be {words[wanted]}")
