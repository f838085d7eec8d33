"""Whole answers for many prompts, for single-threaded batch consumers.

A flight talks to the replicas of one model over non-blocking sockets in the caller's own thread,
inside ``submit`` and ``results``: no thread, no event loop, nothing to inherit across a fork. Make
it after forking, keep it for the life of the process, and let only one thread use it.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import (
    BodyTooLarge,
    ConfigurationError,
    EngineBusy,
    EngineCrashed,
    EngineUnavailable,
    from_code,
)
from shared.log import get_logger
from workers.inference.engines import wire
from workers.inference.engines.base import Answer, Prompt, Tiling
from workers.inference.engines.replicas import (
    BUSY_PAUSE_S,
    SCAN_S,
    Replica,
    SocketWatch,
    least_busy,
    shared_tiling,
)

log = get_logger(__name__)

MIN_WINDOW = 256
SEND_LIMIT_S = 2.0
"""How long ``submit`` tries to get rid of its bytes; an engine that has enough reads none."""
_RECV_BYTES = 256 * 1024
_CONNECT_TIMEOUT_S = 1.0


class _Line:
    """The connection to one host; unsent bytes wait in ``_out``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replica: Replica[Prompt] = Replica()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._frames = wire.frames_from_host()
        self._out: deque[memoryview] = deque()

    def connect(self) -> None:
        """Raises: OSError."""
        self.socket.settimeout(_CONNECT_TIMEOUT_S)
        self.socket.connect(str(self.path))
        self.socket.setblocking(False)

    def queue(self, frames: Iterable[bytearray]) -> None:
        """Send when the socket takes it."""
        self._out.extend(memoryview(frame) for frame in frames)

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._out)

    def write(self) -> None:
        """Send what the socket takes now. Raises: OSError."""
        while self._out:
            try:
                sent = self.socket.send(self._out[0])
            except BlockingIOError:
                return
            if sent < len(self._out[0]):
                self._out[0] = self._out[0][sent:]
                return
            self._out.popleft()

    def read(self) -> list[wire.FromHost]:
        """What came. Raises: OSError, also at the end of the stream; MalformedFrame."""
        try:
            data = self.socket.recv(_RECV_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the engine process hung up")
        return self._frames.feed(data)


class Flight:
    """Prompts on their way through the replicas of one model.

    ``window`` bounds the prompts that are with the engines or about to be; None means twice what
    all replicas together run at once, at least 256. Busy, draining and missing replicas are waited
    for; the caller decides how long, by how often it asks for ``results``.
    """

    def __init__(
        self, run_dir: Path, model: str, *, lane: wire.Lane = "batch", window: int | None = None
    ) -> None:
        self._model = model
        self._lane = lane
        self._window = window
        self._watch = SocketWatch(wire.replica_folder(run_dir, model))
        self._selector = selectors.DefaultSelector()
        self._lines: dict[Path, _Line] = {}
        self._backlog: deque[Prompt] = deque()
        self._finished: list[Answer] = []
        self._last_wire_id = 0
        self._next_scan_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def in_flight(self) -> int:
        """Prompts without an answer yet, those that wait for a replica included."""
        return len(self._backlog) + self.sent

    @property
    def sent(self) -> int:
        """Prompts that replicas have, or are being sent."""
        return sum(len(line.replica.in_flight) for line in self._lines.values())

    @property
    def room(self) -> int:
        """How many more prompts fit the window now; submitting more only lets them wait here."""
        return max(0, self._size() - self.in_flight)

    @property
    def connected(self) -> int:
        """How many replicas take prompts now."""
        return sum(line.replica.ready for line in self._lines.values())

    @property
    def tiling(self) -> Tiling | None:
        """How the replicas want images cut; None if they want files, or none is connected."""
        return shared_tiling(line.replica for line in self._lines.values())

    def look(self, timeout_s: float) -> None:
        """Look for replicas, for so long at most, if none is connected."""
        deadline_s = time.monotonic() + timeout_s
        while not self.connected and (left_s := deadline_s - time.monotonic()) > 0:
            self._turn(min(left_s, SCAN_S))

    def submit(self, prompts: Sequence[Prompt]) -> None:
        """Send prompts off without waiting for answers.

        Ids must be unique among those in flight; each comes back once from ``results``.
        """
        self._backlog.extend(prompts)
        self._turn(0)
        # A socket takes a fifth of a megabyte at a time. What is left would go out only when the
        # caller comes back, and the engine would starve while it prepares the next images.
        deadline_s = time.monotonic() + SEND_LIMIT_S
        while any(line.unsent for line in self._lines.values()):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self._turn(min(left_s, SCAN_S))

    def results(self, timeout_s: float) -> list[Answer]:
        """Wait for answers and return all there are: (id, completion or error).

        Empty after ``timeout_s``, or at once when nothing is in flight. EngineCrashed means that
        the prompt was inside a replica, running or waiting, when its process died.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._finished and self.in_flight:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                break
            self._turn(min(remaining_s, SCAN_S))
        finished, self._finished = self._finished, []
        return finished

    def abort(self) -> None:
        """Forget everything in flight and tell the engines; the flight stays usable.

        They are told by hanging up, which an engine notices that reads nothing for now, too.
        """
        self._backlog.clear()
        self._finished.clear()
        for line in list(self._lines.values()):
            if line.replica.in_flight:
                self._hang_up(line)
        self._next_scan_s = 0.0

    def close(self) -> None:
        """Hang up; the engines abort what is left."""
        for line in list(self._lines.values()):
            self._hang_up(line)
        self._backlog.clear()
        self._selector.close()

    def _size(self) -> int:
        if self._window is not None:
            return self._window
        hellos = [line.replica.hello for line in self._lines.values()]
        return max(MIN_WINDOW, 2 * sum(hello.max_running for hello in hellos if hello))

    def _turn(self, timeout_s: float) -> None:
        """Connect, send, wait for the sockets, read, and send again what now has room."""
        self._find_replicas()
        self._assign()
        for key, events in self._selector.select(timeout_s):
            line: _Line = key.data
            if events & selectors.EVENT_READ:
                self._read(line)
        self._assign()

    def _find_replicas(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_scan_s:
            return
        self._next_scan_s = now_s + SCAN_S
        for path in self._watch.due(now_s):
            self._connect(path)

    def _connect(self, path: Path) -> None:
        line = _Line(path)
        self._watch.opened(path)
        try:
            line.connect()
        except OSError:
            line.socket.close()
            self._watch.closed(path, time.monotonic())
            return
        self._lines[path] = line
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _assign(self) -> None:
        """Give waiting prompts to the least busy replicas and push bytes out."""
        now_s = time.monotonic()
        batches: dict[Path, list[Prompt]] = {}
        free = self._size() - self.sent
        while self._backlog and free > 0:
            line = least_busy(self._lines.values(), now_s)
            if line is None:
                break
            group = self._next_group(line, min(free, line.replica.room(now_s)))
            batches.setdefault(line.path, []).extend(group)
            free -= len(group)
        for path, prompts in batches.items():
            self._queue(self._lines[path], prompts)
        for line in list(self._lines.values()):
            self._write(line)

    def _next_group(self, line: _Line, limit: int) -> list[Prompt]:
        """Take a few prompts at a time, so that replicas fill evenly."""
        assert line.replica.hello is not None  # it has room, so it has greeted us
        count = len(self._backlog)
        if len(self._lines) > 1:
            count = min(count, max(1, line.replica.hello.max_running // 4))
        group: list[Prompt] = []
        for _ in range(min(count, limit)):
            prompt = self._backlog.popleft()
            self._last_wire_id += 1
            line.replica.in_flight[self._last_wire_id] = prompt
            # The caller may use an id again while a late answer to its first use is on the way.
            group.append(Prompt(self._last_wire_id, prompt.turns, prompt.sampling, prompt.images))
        return group

    def _queue(self, line: _Line, prompts: list[Prompt]) -> None:
        frames, too_large = wire.submit_frames(prompts, "whole", self._lane)
        for wire_id in too_large:
            prompt = line.replica.in_flight.pop(wire_id)
            error = BodyTooLarge("the request's images are too large for the engine")
            self._finished.append((prompt.id, error))
        line.queue(frames)

    def _write(self, line: _Line) -> None:
        try:
            line.write()
        except OSError:
            self._lost(line)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.unsent else 0)
        if self._selector.get_key(line.socket).events != events:
            self._selector.modify(line.socket, events, line)

    def _read(self, line: _Line) -> None:
        try:
            for message in line.read():
                self._received(line, message)
        except OSError:
            self._lost(line)
        except (wire.MalformedFrame, ConfigurationError) as error:
            log.warning("replica refused", socket=str(line.path), reason=error.message)
            self._lost(line)

    def _received(self, line: _Line, message: wire.FromHost) -> None:
        match message:
            case wire.Done():
                in_flight = line.replica.in_flight
                for wire_id, completion in message.items:
                    prompt = in_flight.pop(wire_id, None)
                    if prompt is not None:
                        self._finished.append((prompt.id, completion))
            case wire.Failed():
                self._failed(line, message)
            case wire.Hello():
                line.replica.note(message, self._model)
                self._watch.greeted(line.path)
            case wire.Load() | wire.Draining():
                line.replica.note(message, self._model)
            case wire.Deltas():
                raise wire.MalformedFrame("the host sent deltas of a prompt asked for whole")

    def _failed(self, line: _Line, message: wire.Failed) -> None:
        for wire_id, code, text, param in message.items:
            prompt = line.replica.in_flight.pop(wire_id, None)
            if prompt is None:
                continue
            error = from_code(code, text, param)
            if isinstance(error, EngineBusy):
                line.replica.paused_until_s = time.monotonic() + BUSY_PAUSE_S
                self._backlog.append(prompt)
            elif isinstance(error, EngineUnavailable):
                line.replica.draining = True
                self._backlog.append(prompt)
            else:
                self._finished.append((prompt.id, error))

    def _lost(self, line: _Line) -> None:
        for prompt in line.replica.in_flight.values():
            self._finished.append((prompt.id, EngineCrashed()))
        self._hang_up(line)

    def _hang_up(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.socket.close()
        del self._lines[line.path]
        self._watch.closed(line.path, time.monotonic())
