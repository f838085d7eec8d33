"""Streams from this machine's engine processes, for programs with threads.

One background thread runs an event loop that finds the replicas of one model, stays connected to
them and spreads prompts over them, the least busy first. The thread starts with the first request,
so a client made before a fork is usable after it. For batches see ``flight``.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from shared.errors import (
    BodyTooLarge,
    ConfigurationError,
    EngineBusy,
    EngineCrashed,
    EngineUnavailable,
    GpuLent,
    RequestAborted,
    RequestTimedOut,
    VlmqError,
    from_code,
)
from shared.log import get_logger
from workers.inference.engines import wire
from workers.inference.engines.base import Completion, Delta, Prompt, Tiling
from workers.inference.engines.replicas import (
    BUSY_PAUSE_S,
    SCAN_S,
    Replica,
    SocketWatch,
    least_busy,
    shared_tiling,
)
from workers.inference.engines.standby import Standby

log = get_logger(__name__)

EXPECTED_S = 0.15
"""For so long engines keep themselves ready for a chat that was announced."""

OnDelta = Callable[[Delta], None]
OnEnd = Callable[[VlmqError | None], None]


@dataclass(frozen=True)
class ReplicaStatus:
    """A replica that answers: its greeting and how many prompts it runs and keeps waiting."""

    hello: wire.Hello
    running: int
    waiting: int
    draining: bool


@dataclass(slots=True, eq=False)
class _Stream:
    """One streamed request and where it is: on a link, parked, or ended."""

    prompt: Prompt
    lane: wire.Lane
    on_delta: OnDelta
    on_end: OnEnd
    since_s: float = 0.0
    """When it began to wait, on the loop's clock."""
    link: _Link | None = None
    awaits: str | None = None
    """The device that is to give it its first word."""
    wire_id: int = 0
    delivered: bool = False
    crashed: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class Expected:
    """A chat that was announced; belongs to the pool's loop. Spent once it came or took too long."""

    device: str | None = None
    timer: asyncio.TimerHandle | None = None


class StreamHandle:
    """A stream that can be given up."""

    def __init__(self, pool: _Pool, stream: _Stream) -> None:
        self._pool = pool
        self._stream = stream

    def abort(self) -> None:
        """End the stream with RequestAborted, if it has not ended yet. From any thread."""
        if not self._stream.ended:
            self._pool.call(lambda: self._pool.abort(self._stream))


class EngineClient:
    """The replicas of one model on this machine.

    ``run_dir`` holds the sockets (``wire.socket_path``). A request waits up to ``wait_s`` for a
    replica that can take it, and up to ``standby_wait_s`` (None: as long) while the replicas are
    away on purpose. Thread-safe; callbacks run on the client's own thread and must not block.
    """

    def __init__(
        self,
        run_dir: Path,
        model: str,
        *,
        wait_s: float = 10.0,
        standby_wait_s: float | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._model = model
        self._wait_s = wait_s
        self._standby_wait_s = wait_s if standby_wait_s is None else standby_wait_s
        self._lock = threading.Lock()
        self._pool: _Pool | None = None
        self._pid = 0

    def expect(self) -> Expected:
        """Say that a chat's stream will be asked for in a moment, so that batches let it in."""
        pool = self._running_pool()
        expected = Expected()
        pool.call(lambda: pool.expect(expected))
        return expected

    def stream(
        self,
        prompt: Prompt,
        on_delta: OnDelta,
        on_end: OnEnd,
        lane: wire.Lane = "chat",
        *,
        expected: Expected | None = None,
    ) -> StreamHandle:
        """Ask for an answer in deltas; ``expected`` is what ``expect`` said of it.

        ``on_end`` is called exactly once: with None after the last delta, or with what went wrong.
        When an engine dies, a stream without a delta yet is tried once more; others end with
        EngineCrashed. Without a replica it ends with EngineUnavailable, with full ones EngineBusy,
        while their GPU is lent to training GpuLent.
        """
        pool = self._running_pool()
        stream = _Stream(prompt, lane, on_delta, on_end)
        pool.call(lambda: pool.start(stream, expected))
        return StreamHandle(pool, stream)

    def complete(self, prompt: Prompt, *, timeout_s: float, lane: wire.Lane = "chat") -> Completion:
        """Ask and wait for the whole answer. Raises: what a stream ends with; RequestTimedOut."""
        answer: Future[Completion] = Future()
        texts: list[str] = []
        last: list[Delta] = []

        def on_delta(delta: Delta) -> None:
            texts.append(delta.text)
            last[:] = [delta]

        def on_end(error: VlmqError | None) -> None:
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(_completion("".join(texts), last[0]))

        handle = self.stream(prompt, on_delta, on_end, lane)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            handle.abort()
            raise RequestTimedOut() from None

    def replicas(self) -> list[ReplicaStatus]:
        """The replicas that answer now."""
        pool = self._running_pool()
        found: Future[list[ReplicaStatus]] = Future()
        pool.call(lambda: found.set_result(pool.status()))
        return found.result()

    def tiling(self) -> Tiling | None:
        """How the replicas want images cut; None if they want files, or none is known yet."""
        return self._running_pool().tiling

    def close(self) -> None:
        """End all streams with EngineUnavailable and stop the thread."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.stop()

    def _running_pool(self) -> _Pool:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                self._pool = _Pool(self._run_dir, self._model, self._wait_s, self._standby_wait_s)
                self._pid = os.getpid()
            return self._pool


def _completion(text: str, last: Delta) -> Completion:
    return Completion(
        text, last.finish_reason or "stop", last.prompt_tokens, last.completion_tokens
    )


class _Link(asyncio.Protocol):
    """The connection to one host."""

    def __init__(self, pool: _Pool, path: Path) -> None:
        self._pool = pool
        self._frames = wire.frames_from_host()
        self._transport: asyncio.Transport | None = None
        self.path = path
        self.replica: Replica[_Stream] = Replica()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                self._pool.received(self, message)
        except (wire.MalformedFrame, ConfigurationError) as error:
            log.warning("replica refused", socket=str(self.path), reason=error.message)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.lost(self)

    def send(self, frame: bytearray) -> None:
        if self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Pool:
    """Links to the replicas of a model and the streams on them. Lives on its own thread's loop."""

    def __init__(self, run_dir: Path, model: str, wait_s: float, standby_wait_s: float) -> None:
        self._model = model
        self._wait_s = wait_s
        self._standby_wait_s = standby_wait_s
        self._standby = Standby(run_dir, model)
        self._watch = SocketWatch(wire.replica_folder(run_dir, model))
        self._links: dict[Path, _Link] = {}
        self._parked: list[_Stream] = []
        self._awaited: Counter[str] = Counter()
        """Chats without a word, by the device that they wait for."""
        self._last_wire_id = 0
        self.tiling: Tiling | None = None
        """What the replicas agree on; read by other threads."""
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)
        self._thread.start()

    def call(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the loop's thread. Raises: EngineUnavailable after ``stop``."""
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            raise EngineUnavailable("this engine client is closed") from None

    def stop(self) -> None:
        """End everything and wait for the thread."""
        self.call(self._stopping.set)
        self._thread.join()

    def start(self, stream: _Stream, expected: Expected | None) -> None:
        """Send a new stream to a replica, or park it until one has room."""
        stream.since_s = self._loop.time()
        self._place(stream)
        if expected is not None:
            self._spend(expected)

    def expect(self, expected: Expected) -> None:
        """A chat is about to start: its likely device should be ready for it."""
        link = least_busy(self._links.values(), self._loop.time())
        if link is None:
            return
        expected.device = link.replica.device
        expected.timer = self._loop.call_later(EXPECTED_S, self._spend, expected)
        self._count(expected.device, +1)

    def abort(self, stream: _Stream) -> None:
        """Give a stream up."""
        if stream.ended:
            return
        if stream.link is not None:
            stream.link.replica.in_flight.pop(stream.wire_id)
            stream.link.send(wire.encode(wire.Abort([stream.wire_id])))
        else:
            self._parked.remove(stream)
        self._end(stream, RequestAborted())

    def status(self) -> list[ReplicaStatus]:
        """What is known of the replicas that have greeted us."""
        return [
            ReplicaStatus(r.hello, r.load.running, r.load.waiting, r.draining)
            for link in self._links.values()
            if (r := link.replica).hello is not None
        ]

    def received(self, link: _Link, message: wire.FromHost) -> None:
        """Act on what a host said."""
        match message:
            case wire.Deltas():
                self._deltas(link, message)
            case wire.Done():
                self._done(link, message)
            case wire.Failed():
                self._failed(link, message)
            case wire.Hello():
                link.replica.note(message, self._model)
                self._watch.greeted(link.path)
                self.tiling = shared_tiling(known.replica for known in self._links.values())
                if self._awaited[message.device]:
                    link.send(wire.encode(wire.Chats(self._awaited[message.device])))
                self._place_parked()
            case wire.Load() | wire.Draining():
                link.replica.note(message, self._model)

    def lost(self, link: _Link) -> None:
        """A host is gone; nothing it had may be left hanging."""
        if self._links.get(link.path) is not link:
            return
        del self._links[link.path]
        self._watch.closed(link.path, self._loop.time())
        streams = list(link.replica.in_flight.values())
        link.replica.in_flight.clear()
        for stream in streams:
            self._crashed(stream, EngineCrashed())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._watch_replicas())
        finally:
            self._loop.close()

    async def _watch_replicas(self) -> None:
        while not self._stopping.is_set():
            for path in self._watch.due(self._loop.time()):
                await self._connect(path)
            self._expire_parked()
            self._place_parked()
            try:
                async with asyncio.timeout(SCAN_S):
                    await self._stopping.wait()
            except TimeoutError:
                continue
        self._end_all()
        await asyncio.sleep(0)  # lets the closed transports go

    async def _connect(self, path: Path) -> None:
        link = _Link(self, path)
        self._watch.opened(path)
        self._links[path] = link
        try:
            async with asyncio.timeout(1.0):
                await self._loop.create_unix_connection(lambda: link, str(path))
        except (OSError, TimeoutError):
            self.lost(link)

    def _place(self, stream: _Stream) -> None:
        link = least_busy(self._links.values(), self._loop.time())
        if link is None:
            stream.link = None
            self._await(stream, None)
            self._parked.append(stream)
            return
        if stream.lane == "chat":
            self._await(stream, link.replica.device)
        self._last_wire_id += 1
        stream.link, stream.wire_id = link, self._last_wire_id
        prompt = msgspec.structs.replace(stream.prompt, id=stream.wire_id)
        frames, too_large = wire.submit_frames([prompt], "stream", stream.lane)
        if too_large:
            self._end(stream, BodyTooLarge("the request's images are too large for the engine"))
            return
        link.replica.in_flight[stream.wire_id] = stream
        link.send(frames[0])

    def _await(self, stream: _Stream, device: str | None) -> None:
        """Count this stream among those that wait for a device, and no longer for another."""
        before, stream.awaits = stream.awaits, device
        if device == before:
            return
        if device is not None:
            self._count(device, +1)
        if before is not None:
            self._count(before, -1)

    def _count(self, device: str, change: int) -> None:
        """Tell all that compute on a device how many chats wait for it now."""
        self._awaited[device] += change
        told = wire.encode(wire.Chats(self._awaited[device]))
        for link in self._links.values():
            if link.replica.hello is not None and link.replica.device == device:
                link.send(told)

    def _spend(self, expected: Expected) -> None:
        """It came, or it does not count any more; once."""
        device, expected.device = expected.device, None
        if device is not None:
            assert expected.timer is not None
            expected.timer.cancel()
            self._count(device, -1)

    def _place_parked(self) -> None:
        parked, self._parked = self._parked, []
        for stream in parked:
            self._place(stream)

    def _expire_parked(self) -> None:
        if not self._parked:
            return
        limit_s = self._wait_s
        if self._standby.is_on():
            if self._refuse_parked():
                return
            self._want()
            limit_s = self._standby_wait_s
        begun_s = self._loop.time() - limit_s
        late = [stream for stream in self._parked if stream.since_s <= begun_s]
        self._parked = [stream for stream in self._parked if stream.since_s > begun_s]
        full = any(link.replica.ready for link in self._links.values())
        for stream in late:
            self._end(stream, EngineBusy() if full else EngineUnavailable())

    def _refuse_parked(self) -> bool:
        """Tell everybody who waits that the engines will be away for longer than that."""
        try:
            lent = self._standby.lent()
        except VlmqError as error:
            log.warning("standby not read", model=self._model, reason=error.message)
            return False
        if not lent:
            return False
        parked, self._parked = self._parked, []
        for stream in parked:
            self._end(stream, GpuLent(f"{lent}; try again in a while", param="model"))
        return True

    def _want(self) -> None:
        try:
            self._standby.want()
        except VlmqError as error:
            # Whoever waits gets a 503 in time; the streams that run must go on.
            log.warning("model not asked for", model=self._model, reason=error.message)

    def _deltas(self, link: _Link, message: wire.Deltas) -> None:
        for wire_id, text in message.items:
            stream = link.replica.in_flight.get(wire_id)
            if stream is not None:
                self._deliver(stream, Delta(text))

    def _done(self, link: _Link, message: wire.Done) -> None:
        for wire_id, last in message.items:
            stream = link.replica.in_flight.pop(wire_id, None)
            if stream is None:
                continue
            delta = Delta(last.text, last.finish_reason, last.prompt_tokens, last.completion_tokens)
            self._deliver(stream, delta)
            self._end(stream, None)
        if self._parked:
            self._place_parked()

    def _failed(self, link: _Link, message: wire.Failed) -> None:
        for wire_id, code, text, param in message.items:
            stream = link.replica.in_flight.pop(wire_id, None)
            if stream is None:
                continue
            error = from_code(code, text, param)
            if isinstance(error, EngineCrashed):
                self._crashed(stream, error)
            elif isinstance(error, EngineBusy | EngineUnavailable) and not stream.delivered:
                self._turned_away(link, stream, error)
            else:
                self._end(stream, error)

    def _turned_away(self, link: _Link, stream: _Stream, error: VlmqError) -> None:
        now_s = self._loop.time()
        if isinstance(error, EngineBusy):
            link.replica.paused_until_s = now_s + BUSY_PAUSE_S
        else:
            link.replica.draining = True
            stream.since_s = now_s
        self._place(stream)

    def _crashed(self, stream: _Stream, error: VlmqError) -> None:
        if stream.delivered or stream.crashed:
            self._end(stream, error)
            return
        stream.crashed = True
        stream.since_s = self._loop.time()
        self._place(stream)

    def _deliver(self, stream: _Stream, delta: Delta) -> None:
        stream.delivered = True
        self._await(stream, None)
        try:
            stream.on_delta(delta)
        except Exception:
            log.exception("a stream's on_delta raised")

    def _end(self, stream: _Stream, error: VlmqError | None) -> None:
        stream.ended = True
        stream.link = None
        self._await(stream, None)
        try:
            stream.on_end(error)
        except Exception:
            log.exception("a stream's on_end raised")

    def _end_all(self) -> None:
        streams = list(self._parked)
        for link in self._links.values():
            streams += link.replica.in_flight.values()
            link.replica.in_flight.clear()
            link.close()
        self._links = {}
        self._parked = []
        for stream in streams:
            self._end(stream, EngineUnavailable("this engine client was closed"))
