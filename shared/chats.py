"""Interactive requests on their way to a consumer and their answers on the way back.

The body waits in a key of its own; the ticket names it, and taking the body (GETDEL) is the claim,
so a duplicate ticket finds nothing. Every API process has one capped stream, its inbox, that all
its answers come back on, read by one thread, which also tells Redis of what has ended and what was
counted meanwhile. If a consumer vanishes before the first word, the
API's side submits the request once more; after that it fails explicitly.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Literal

import msgspec

from shared.connection import PREFIX, Connection, redis_errors
from shared.errors import (
    EngineCrashed,
    GpuLent,
    ModelUnavailable,
    QueueUnavailable,
    RateLimited,
    RequestAborted,
    RequestTimedOut,
    VlmqError,
    from_code,
)
from shared.ids import new_id
from shared.log import get_logger
from shared.metrics import (
    CHAT_DURATION,
    CHAT_ERRORS,
    CHATS,
    FIRST_TOKEN,
    IMAGES,
    TOKENS,
    Counts,
    Metric,
)
from shared.metrics import KEY as METRICS_KEY
from shared.presence import Presence
from shared.queue import Tickets, chat_queue

log = get_logger(__name__)

ABORTS = f"{PREFIX}aborts"
"""The channel that names requests whose clients went away."""
_OPEN = f"{PREFIX}chats"
_INBOX_LENGTH = 50_000
_INBOX_TTL_S = 120
_TRIM_EVERY_S = 1.0
_CHECK_AFTER_S = 1.0
_MISSES_TO_GIVE_UP = 3
"""One look may fall between a claim and the news of it, or between Redis's return and a beat."""
_MAX_SUBMISSIONS = 2


class ChatJob(msgspec.Struct, frozen=True, array_like=True):
    """What a consumer gets. ``deadline`` is in Unix seconds."""

    id: str
    owner: str
    model: str
    body: bytes
    inbox: str
    deadline: float
    submission: int = 1


class ChatEnd(msgspec.Struct, frozen=True):
    """The answer is complete."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class ChatEvent(msgspec.Struct, frozen=True, array_like=True):
    """One thing that happened to a request; ``kind`` says which of the other fields count."""

    id: str
    submission: int
    kind: Literal["claimed", "delta", "end", "error"]
    text: str = ""
    """The consumer's name, the delta, the finish reason, or the error's message."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    code: str = ""
    param: str | None = None


_events = msgspec.msgpack.Decoder(list[ChatEvent])


# --- the API's side ---------------------------------------------------------------------------


class ChatQueue:
    """Submits chat requests and hands their events to whoever waits."""

    def __init__(
        self, client: Connection, tickets: Tickets, presence: Presence, *, max_open: int
    ) -> None:
        self._redis: Any = client
        self.tickets = tickets
        self.presence = presence
        self._max_open = max_open
        self._inbox = f"{PREFIX}inbox:{new_id('api_')}"
        self._replies: dict[str, ChatReply] = {}
        self._ended: list[str] = []
        self.counts = Counts()
        self._lock = threading.Lock()
        self._tell_lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._closed = threading.Event()

    def submit(
        self, *, owner: str, model: str, body: bytes, timeout_s: float, images: int = 0
    ) -> ChatReply:
        """Put a validated request in line; ``images`` is how many it holds, to be counted.

        Raises: ModelUnavailable when no node has or can load it, GpuLent, RateLimited, QueueUnavailable.
        """
        deadline = time.time() + timeout_s
        job = ChatJob(new_id("chatcmpl-"), owner, model, body, self._inbox, deadline)
        self._start_reader()
        try:
            return self._submit(job, images)
        except VlmqError as error:
            self.count_failure(model, error)
            raise

    def _submit(self, job: ChatJob, images: int) -> ChatReply:
        model = job.model
        if not self.presence.obtainable(model):
            lent = self.presence.lent(model)
            if lent is not None:
                raise GpuLent(f"{lent}; try again in a while", param="model")
            raise ModelUnavailable(
                f"no running worker serves the model '{model}' right now; one that was linked "
                "a moment ago is loaded first ('vlmq status' shows it)",
                param="model",
            )
        reply = ChatReply(self, job, images=images)
        with self._lock:
            self._replies[job.id] = reply
        try:
            self._enter(job)
            self.send(job)
        except VlmqError:
            self.forget(job.id)
            raise
        return reply

    def _enter(self, job: ChatJob) -> None:
        with self._telling() as pipeline:
            pipeline.zremrangebyscore(_OPEN, "-inf", time.time())
            pipeline.zcard(_OPEN)
            pipeline.zadd(_OPEN, {job.id: job.deadline})
            is_open = pipeline.execute()[-2]
        if is_open >= self._max_open:
            self._redis.zrem(_OPEN, job.id)
            raise RateLimited(f"{is_open} chat requests are open already; try again shortly")

    def send(self, job: ChatJob) -> None:
        """Write the body and publish a ticket for it."""
        left_ms = max(1, int((job.deadline - time.time()) * 1000))
        self._redis.set(_body_key(job.id), msgspec.msgpack.encode(job), px=left_ms)
        self.tickets.chat(job.model, job.id)

    def is_waiting(self, job: ChatJob) -> bool:
        """Whether no consumer has taken the request yet."""
        return bool(self._redis.exists(_body_key(job.id)))

    def withdraw(self, chat_id: str) -> None:
        """Take a request back, wherever it is."""
        pipeline = self._redis.pipeline()
        pipeline.delete(_body_key(chat_id))
        pipeline.publish(ABORTS, chat_id)
        pipeline.execute()

    def forget(self, chat_id: str) -> None:
        """Nobody waits for this request any more. Redis hears of it with the next command."""
        with self._lock:
            self._replies.pop(chat_id, None)
            self._ended.append(chat_id)

    @contextmanager
    def _ended_ids(self) -> Iterator[list[str]]:
        """Requests of whose end Redis is told in the block; kept if it does not answer."""
        with self._lock:
            ended, self._ended = self._ended, []
        try:
            yield ended
        except QueueUnavailable:
            with self._lock:
                self._ended += ended
            raise

    @contextmanager
    def _telling(self) -> Iterator[Any]:
        """A pipeline that begins with all that Redis has to hear; execute it in the block."""
        pipeline = self._redis.pipeline()
        with self._ended_ids() as ended, self.counts.told() as counted:
            if ended:
                pipeline.zrem(_OPEN, *ended)
            for name, by in counted.items():
                pipeline.hincrby(METRICS_KEY, name, by)
            yield pipeline

    def _tell(self) -> None:
        with self._tell_lock, self._telling() as pipeline:
            if len(pipeline):
                pipeline.execute()

    def count_failure(self, model: str, error: VlmqError) -> None:
        """Count a request that ended without an answer."""
        if isinstance(error, RequestAborted):
            self.counts.add(CHATS, model, "aborted")
            return
        self.counts.add(CHATS, model, "failed")
        self.counts.add(CHAT_ERRORS, model, error.code)

    def close(self) -> None:
        """Stop reading, and tell Redis what it has not heard yet."""
        self._closed.set()
        try:
            self._tell()
        except QueueUnavailable:
            log.warning("chats_not_counted")  # the ids leave Redis at their deadlines

    def _start_reader(self) -> None:
        with self._lock:
            if self._reader is None:
                self._reader = threading.Thread(target=self._read, name="inbox", daemon=True)
                self._reader.start()

    def _read(self) -> None:
        last = b"0"
        seen: dict[bytes, int] = {}
        trim_at = 0.0
        while not self._closed.is_set():
            try:
                self._tell()
                if time.monotonic() >= trim_at:
                    # What was read is of no use to anybody, and Redis keeps it in memory.
                    self._redis.xtrim(self._inbox, minid=last, approximate=True)
                    trim_at = time.monotonic() + _TRIM_EVERY_S
                found = self._redis.xread({self._inbox: last}, count=500, block=1000)
            except QueueUnavailable:
                self._closed.wait(0.2)
                continue
            except Exception:
                # Every answer of this process comes through here: it must go on.
                log.exception("inbox_not_read")
                self._closed.wait(1.0)
                continue
            for _, entries in found:
                for entry_id, fields in entries:
                    last = entry_id
                    desk, number = fields[b"d"], int(fields[b"n"])
                    if seen.get(desk, 0) < number:
                        seen[desk] = number
                        self._dispatch(_events.decode(fields[b"e"]))

    def _dispatch(self, events: Sequence[ChatEvent]) -> None:
        for event in events:
            reply = self._replies.get(event.id)
            if reply is not None:
                reply.deliver(event)


class ChatReply:
    """The answer to one request, as it comes."""

    def __init__(self, queue: ChatQueue, job: ChatJob, *, images: int = 0) -> None:
        self.id = job.id
        self._images = images
        self._submitted_at = time.monotonic()
        self._queue = queue
        self._job = job
        self._events: SimpleQueue[ChatEvent] = SimpleQueue()
        self._consumer: str | None = None
        self._started = False
        self._ended = False
        self._heard_at = time.monotonic()
        self._misses = 0

    def deliver(self, event: ChatEvent) -> None:
        """Called by the inbox's thread."""
        self._events.put(event)

    def next(self, timeout_s: float) -> str | ChatEnd | None:
        """A piece of text, the end, or ``None`` if nothing came within ``timeout_s``.

        Raises: what the consumer reported; RequestTimedOut; EngineCrashed if the consumer died.
        """
        event = self._take(timeout_s)
        if event is None:
            self._look_after()
            return None
        self._heard_at = time.monotonic()
        self._misses = 0
        if event.submission != self._job.submission or event.kind == "claimed":
            if event.submission == self._job.submission:
                self._consumer = event.text
            return None
        if event.kind == "delta":
            if not self._started:
                self._started = True
                self._observe(FIRST_TOKEN)
            return event.text
        self._ended = True
        if event.kind == "error":
            error = from_code(event.code, event.text, event.param)
            self._queue.count_failure(self._job.model, error)
            raise error
        end = ChatEnd(event.text, event.prompt_tokens, event.completion_tokens)
        self._count(end)
        return end

    def abort(self) -> None:
        """The client went away: stop the work. Harmless when repeated or too late."""
        self._stop(RequestAborted())

    def _stop(self, reason: VlmqError) -> None:
        if not self._ended:
            self._ended = True
            self._queue.count_failure(self._job.model, reason)
            self._queue.withdraw(self.id)
        self.close()

    def close(self) -> None:
        """Let go."""
        self._queue.forget(self.id)

    def _observe(self, metric: Metric) -> None:
        seconds = time.monotonic() - self._submitted_at
        self._queue.counts.observe(metric, self._job.model, seconds=seconds)

    def _count(self, end: ChatEnd) -> None:
        counts, model = self._queue.counts, self._job.model
        self._observe(CHAT_DURATION)
        counts.add(CHATS, model, "completed")
        counts.add(IMAGES, model, "chat", by=self._images)
        counts.add(TOKENS, model, "chat", "prompt", by=end.prompt_tokens)
        counts.add(TOKENS, model, "chat", "completion", by=end.completion_tokens)

    def _take(self, timeout_s: float) -> ChatEvent | None:
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def _look_after(self) -> None:
        """Nothing was heard for a while: find out whether anything still can be."""
        if time.time() > self._job.deadline:
            late = RequestTimedOut()
            self._stop(late)
            raise late
        if time.monotonic() - self._heard_at < _CHECK_AFTER_S:
            return
        self._heard_at = time.monotonic()
        try:
            if self._consumer is not None:
                if not self._queue.presence.consumer_alive(self._consumer):
                    self._missed()
            elif not self._queue.is_waiting(self._job):
                self._missed()
            elif self._queue.tickets.waiting(chat_queue(self._job.model)) == 0:
                self._queue.tickets.chat(self._job.model, self._job.id)  # its ticket was lost
        except QueueUnavailable:
            log.warning(
                "chat_unwatched", chat_id=self.id
            )  # Redis may come back before the deadline

    def _missed(self) -> None:
        self._misses += 1
        if self._misses >= _MISSES_TO_GIVE_UP:
            self._misses = 0
            self._again()

    def _again(self) -> None:
        if self._started or self._job.submission >= _MAX_SUBMISSIONS:
            died = EngineCrashed("the worker that answered this request died; send it again")
            self._stop(died)
            raise died
        log.warning("chat_resubmitted", chat_id=self.id, consumer=self._consumer)
        again = msgspec.structs.replace(self._job, submission=self._job.submission + 1)
        self._queue.send(again)
        self._job = again
        self._consumer = None


# --- the consumer's side ----------------------------------------------------------------------


class ChatDesk:
    """Takes requests and sends events; all streams of a process share one writer thread."""

    def __init__(self, client: Connection, *, coalesce_s: float = 0.02) -> None:
        self._redis: Any = client
        self._coalesce_s = coalesce_s
        self._name = new_id("desk_")
        self._flushes = 0
        self._pending: deque[tuple[str, ChatEvent]] = deque()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="replies", daemon=True)
        self._writer.start()

    def take(self, chat_id: str) -> ChatJob | None:
        """Claim a request; ``None`` if another ticket did, or its client went away."""
        raw = self._redis.getdel(_body_key(chat_id))
        return None if raw is None else msgspec.msgpack.decode(raw, type=ChatJob)

    def send(self, inbox: str, event: ChatEvent) -> None:
        """Send an event soon; never blocks."""
        self._pending.append((inbox, event))
        self._wake.set()
        if event.kind != "delta":
            self._urgent.set()

    def watch_aborts(self, on_abort: Callable[[str], None]) -> None:
        """Call ``on_abort`` with each request whose client went away, for ever. Needs a thread."""
        while not self._closed:
            try:
                with redis_errors(), self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(ABORTS)
                    while not self._closed:
                        message = channel.get_message(timeout=1.0)
                        if message is not None:
                            on_abort(message["data"].decode())
            except (QueueUnavailable, OSError):
                time.sleep(0.5)

    def close(self) -> None:
        """Send what is pending and stop."""
        self._closed = True
        self._wake.set()
        self._writer.join(timeout=5)

    def _write(self) -> None:
        while not (self._closed and not self._pending):
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            if not self._pending:
                continue
            self._urgent.clear()
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            self._flush(batch)
            # First words leave at once; a flood of them leaves a handful of times per second.
            # Only words wait: an end, an error or a claim holds up whoever waits for it.
            if len(batch) > 1 or self._pending:
                self._urgent.wait(self._coalesce_s)

    def _flush(self, batch: list[tuple[str, ChatEvent]]) -> None:
        by_inbox: dict[str, list[ChatEvent]] = {}
        for inbox, event in batch:
            by_inbox.setdefault(inbox, []).append(event)
        # If the answer to this is lost it is sent again; the reader knows it by its number.
        self._flushes += 1
        stamp: dict[Any, Any] = {"d": self._name, "n": self._flushes}
        while True:
            try:
                pipeline = self._redis.pipeline(transaction=False)
                for inbox, events in by_inbox.items():
                    body = msgspec.msgpack.encode(_coalesced(events))
                    pipeline.xadd(
                        inbox, {"e": body, **stamp}, maxlen=_INBOX_LENGTH, approximate=True
                    )
                    pipeline.expire(inbox, _INBOX_TTL_S)
                pipeline.execute()
                return
            except QueueUnavailable:
                if self._closed:
                    log.error("replies_lost", events=len(batch))  # noqa: TRY400 - the cause is known
                    return
                time.sleep(0.2)
            except Exception:
                # The next batch must not wait for one that Redis will never take.
                log.exception("replies_lost", events=len(batch))
                return


def _coalesced(events: list[ChatEvent]) -> list[ChatEvent]:
    """Join deltas of one request that nothing else of it comes between."""
    joined: list[ChatEvent] = []
    open_deltas: dict[str, int] = {}
    for event in events:
        at = open_deltas.get(event.id)
        if event.kind == "delta" and at is not None and joined[at].submission == event.submission:
            joined[at] = msgspec.structs.replace(joined[at], text=joined[at].text + event.text)
            continue
        if event.kind == "delta":
            open_deltas[event.id] = len(joined)
        else:
            open_deltas.pop(event.id, None)
        joined.append(event)
    return joined


def _body_key(chat_id: str) -> str:
    return f"{PREFIX}chat:{chat_id}"
