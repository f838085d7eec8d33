"""The engine process: one replica of one model, serving this machine's consumers on a Unix socket.

    python -m workers.inference.engines.host --engine echo --socket PATH --replica N --spec FILE

The parent pins the GPU (``CUDA_VISIBLE_DEVICES``) before it starts this process; nothing heavy is
imported before the arguments are read. The socket appears when the model is loaded and has answered
its first prompts, never before.
SIGTERM drains: nothing new, what runs is finished, then exit 0; a second one stops at once.

Exit status: 0 after a drain, 3 if starting again would fail the same way (configuration, model,
refused code), anything else is a crash.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from shared.errors import (
    ConfigurationError,
    EngineCrashed,
    EngineSetupFailed,
    EngineUnavailable,
    RemoteCodeRefused,
    VlmqError,
)
from shared.log import configure, get_logger
from shared.process import die_with_parent
from workers.inference.engines import wire
from workers.inference.engines.base import Completion, Engine, EngineSpec
from workers.inference.engines.dispatch import MAX_WAITING_BYTES, Dispatcher
from workers.inference.engines.warmup import warm_up

log = get_logger(__name__)

ENGINES = {
    "echo": "workers.inference.engines.echo:EchoEngine",
    "lmdeploy": "workers.inference.engines.lmdeploy_engine:LmdeployEngine",
    "transformers": "workers.inference.engines.transformers_engine:TransformersEngine",
}
"""Short names; an engine of one's own is named ``module:Class``."""

EXIT_PERMANENT = 3
EXIT_UNHEALTHY = 1

MAX_UNSENT_BYTES = 16 * 1024 * 1024
"""A client that leaves this much unread is dropped."""

LOAD_INTERVAL_S = 0.1
GLANCE_S = 0.25
"""How often clients that are not read are looked at: they may have gone."""
HEALTH_INTERVAL_S = 2.0
CLOSE_LIMIT_S = 10.0
LEAVE_LIMIT_S = 1.0
"""How long clients have to take their last answers when the engine process stops."""

EngineFactory = Callable[[EngineSpec], Engine]


@dataclass(frozen=True)
class HostOptions:
    """What one engine process was started with. Times are in seconds, queues in prompts."""

    engine: str
    socket: Path
    replica: int
    spec: EngineSpec
    max_waiting: int = 4096
    max_waiting_bytes: int = MAX_WAITING_BYTES
    drain_limit_s: float = 60.0
    warm_up_limit_s: float = 300.0


class Connection(asyncio.BufferedProtocol):
    """One client. Answers of one turn of the event loop share a frame."""

    def __init__(self, server: HostServer) -> None:
        self._server = server
        self._frames = wire.frames_to_host()
        self._transport: asyncio.Transport | None = None
        self._deltas: list[tuple[int, str]] = []
        self._done: list[tuple[int, Completion]] = []
        self._failed: list[tuple[int, str, str, str | None]] = []
        self._flush_due = False
        self._ended = False
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the client."""
        self._transport = cast(asyncio.Transport, transport)
        self._server.joined(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where what comes is put: tiles are large, and would be copied once more."""
        del sizehint
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Act on what came; a client that breaks the protocol is cut off, alone."""
        try:
            for message in self._frames.arrived(nbytes):
                if not self._ended:
                    self._server.received(self, message)
        except wire.MalformedFrame as error:
            self._drop(error.message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abort what this client asked for."""
        self._transport = None
        self.closed.set()
        self._server.left(self)

    def hold(self, held: bool) -> None:  # noqa: FBT001 - a state, not an option
        """Read nothing from this client until told again."""
        if self._transport is None:
            return
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def end_if_gone(self) -> None:
        """Notice that the client hung up, which a transport does not that is not reading."""
        if self._transport is not None and _hung_up(self._transport.get_extra_info("socket")):
            self._transport.abort()

    def delta(self, prompt_id: int, text: str) -> None:
        """Send a piece of an answer."""
        self._deltas.append((prompt_id, text))
        self._flush_soon()

    def done(self, prompt_id: int, completion: Completion) -> None:
        """Send an answer."""
        self._done.append((prompt_id, completion))
        self._flush_soon()

    def failed(self, prompt_id: int, error: VlmqError) -> None:
        """Send a failure."""
        self._failed.append((prompt_id, error.code, error.message, error.param))
        self._flush_soon()

    def send(self, message: wire.FromHost) -> None:
        """Send one message now, unless the client is gone or has stopped reading."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._ended:
            return
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._drop("it does not read its answers")
            return
        transport.write(wire.encode(message))

    def end(self) -> None:
        """Send what is left and say that nothing follows; ``closed`` once the client has gone, too.

        Who hangs up first has to be the client: one that writes to a socket that is closed already
        is told so at once, and may not read any more what was sent to it before.
        """
        self._flush()
        if self._transport is not None and not self._transport.is_closing():
            self._ended = True
            self._transport.write_eof()
            self._transport.resume_reading()

    def hang_up(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._deltas:
            self.send(wire.Deltas(self._deltas))
            self._deltas = []
        if self._done:
            self.send(wire.Done(self._done))
            self._done = []
        if self._failed:
            self.send(wire.Failed(self._failed))
            self._failed = []

    def _drop(self, reason: str) -> None:
        log.warning("client dropped", reason=reason)
        self.hang_up()


class HostServer:
    """The socket's side of an engine process: clients come, ask and go."""

    def __init__(self, engine: Engine, options: HostOptions) -> None:
        self._engine = engine
        self._options = options
        self._connections: set[Connection] = set()
        self._batches: set[Connection] = set()
        self._enough = False
        self._dispatcher = Dispatcher(
            engine,
            options.spec.max_running,
            options.max_waiting,
            max_waiting_bytes=options.max_waiting_bytes,
            on_enough=self._hold_batches,
        )
        self._listener: asyncio.Server | None = None
        self._inode: tuple[int, int] | None = None

    async def listen(self) -> None:
        """Start to serve, then let the socket appear under its name, replacing a stale one."""
        path = self._options.socket
        unready = path.with_suffix(".new")
        unready.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(unready))
        unready.chmod(0o600)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: Connection(self), sock=listener)
        self._inode = _inode(unready)
        unready.rename(path)

    def joined(self, connection: Connection) -> None:
        """Greet a new client."""
        self._connections.add(connection)
        self._dispatcher.join(connection)
        spec = self._options.spec
        connection.send(
            wire.Hello(
                version=wire.VERSION,
                model=spec.model,
                replica=self._options.replica,
                engine=self._options.engine,
                pid=os.getpid(),
                session_len=spec.session_len,
                max_running=spec.max_running,
                max_waiting=self._options.max_waiting,
                tiling=self._engine.tiling(),
                device=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            )
        )
        connection.send(self._dispatcher.load())

    def received(self, connection: Connection, message: wire.ToHost) -> None:
        """Act on a client's message."""
        match message:
            case wire.Submit():
                if message.lane == "batch" and connection not in self._batches:
                    self._batches.add(connection)
                    connection.hold(self._enough)
                self._dispatcher.submit(connection, message)
            case wire.Abort():
                self._dispatcher.abort(connection, message.ids)
            case wire.Chats():
                self._dispatcher.chats_wait(connection, message.waiting)
            case wire.Ping():
                connection.send(self._dispatcher.load())

    def left(self, connection: Connection) -> None:
        """Forget a client and what it asked for."""
        self._connections.discard(connection)
        self._batches.discard(connection)
        self._dispatcher.leave(connection)

    def _hold_batches(self, enough: bool) -> None:  # noqa: FBT001 - a state, not an option
        self._enough = enough
        for connection in self._batches:
            connection.hold(enough)

    async def see_who_is_gone(self) -> None:
        """Look after clients that are not read. Runs for ever."""
        while True:
            await asyncio.sleep(GLANCE_S)
            if self._enough:
                for connection in list(self._batches):
                    connection.end_if_gone()

    async def report_load(self) -> None:
        """Tell all clients how busy the engine is, whenever that has changed. Runs for ever."""
        told = self._dispatcher.load()
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            load = self._dispatcher.load()
            if load != told:
                told = load
                self._broadcast(load)

    async def until_unhealthy(self) -> str:
        """Return what is wrong once the engine says that it cannot work."""
        while True:
            health = self._engine.health()
            if not health.ok:
                return health.detail or "the engine is not healthy"
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def drain(self, cut_short: Awaitable[object]) -> None:
        """Take nothing new and finish what runs, within the limit or until cut short."""
        self._stop_listening()
        self._broadcast(wire.Draining())
        self._dispatcher.close_door()
        emptied = asyncio.ensure_future(self._dispatcher.until_empty())
        hurried = asyncio.ensure_future(cut_short)
        await asyncio.wait(
            {emptied, hurried},
            timeout=self._options.drain_limit_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not emptied.done():
            log.warning("drain cut short", running=self._dispatcher.load().running)
        for waiter in (emptied, hurried):
            waiter.cancel()
        await self.stop(EngineUnavailable("the engine process stopped before this was finished"))

    async def stop(self, error: VlmqError) -> None:
        """Fail what is left with ``error`` and have all clients leave."""
        self._stop_listening()
        self._dispatcher.fail_all(error)
        await self._dispatcher.close()
        connections = list(self._connections)
        for connection in connections:
            connection.end()
        leaving = [asyncio.ensure_future(connection.closed.wait()) for connection in connections]
        if leaving:
            _, stuck = await asyncio.wait(leaving, timeout=LEAVE_LIMIT_S)
            for waiter in stuck:
                waiter.cancel()
            for connection in list(self._connections):
                connection.hang_up()

    def _stop_listening(self) -> None:
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        path = self._options.socket
        # A successor may have put its own socket there.
        if path.exists() and _inode(path) == self._inode:
            path.unlink()

    def _broadcast(self, message: wire.FromHost) -> None:
        for connection in list(self._connections):
            connection.send(message)


def _hung_up(link: socket.socket) -> bool:
    poller = select.poll()
    poller.register(link.fileno(), 0)  # asked for nothing, it still tells of the end
    return bool(poller.poll(0))


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


async def serve(make_engine: EngineFactory, options: HostOptions) -> int:
    """Load the model, serve until told to stop, and return the exit status."""
    wire.check_socket_path(options.socket)
    options.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = make_engine(options.spec)
    await _set_up(engine)
    await warm_up(engine, options.warm_up_limit_s, EXIT_PERMANENT)
    # What the model's code allocated stays for good; do not walk it at every collection.
    gc.collect()
    gc.freeze()
    server = HostServer(engine, options)
    stop, hurry = _watch_signals()
    await server.listen()
    log.info("engine ready", model=options.spec.model, replica=options.replica)
    try:
        return await _until_stopped(server, stop, hurry)
    finally:
        await _close(engine)


async def _close(engine: Engine) -> None:
    try:
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await engine.close()
    except TimeoutError:
        log.warning("engine did not close in time", limit_s=CLOSE_LIMIT_S)


async def _set_up(engine: Engine) -> None:
    try:
        await engine.setup()
    except SystemExit as error:
        # Inference libraries leave this way when they do not like what they find.
        raise EngineSetupFailed(f"the engine gave up while loading: {error}") from error


async def _until_stopped(server: HostServer, stop: asyncio.Event, hurry: asyncio.Event) -> int:
    reporting = asyncio.ensure_future(server.report_load())
    glancing = asyncio.ensure_future(server.see_who_is_gone())
    stopping = asyncio.ensure_future(stop.wait())
    ailing = asyncio.ensure_future(server.until_unhealthy())
    await asyncio.wait({stopping, ailing}, return_when=asyncio.FIRST_COMPLETED)
    for task in (stopping, reporting, glancing):
        task.cancel()
    if ailing.done():
        detail = ailing.result()
        log.error("engine unhealthy", detail=detail)
        await server.stop(EngineCrashed(detail))
        return EXIT_UNHEALTHY
    ailing.cancel()
    await server.drain(hurry.wait())
    return 0


def _watch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events for the first and for the second SIGTERM or SIGINT."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_signal)
    loop.add_signal_handler(signal.SIGINT, on_signal)
    return stop, hurry


def find_engine(name: str) -> EngineFactory:
    """Import an engine by its short name or ``module:Class``.

    Raises: ConfigurationError if there is no such engine or something it needs is not installed.
    """
    module_name, _, class_name = ENGINES.get(name, name).partition(":")
    if not class_name:
        known = ", ".join(sorted(ENGINES))
        raise ConfigurationError(f"there is no engine '{name}'; use {known} or module:Class")
    try:
        module = importlib.import_module(module_name)
        return cast(EngineFactory, getattr(module, class_name))
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"the engine '{name}' cannot be imported: {error}") from error


def read_spec(source: str) -> EngineSpec:
    """Read the EngineSpec, as JSON, from a file or from standard input (``-``).

    Raises: ConfigurationError.
    """
    try:
        text = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        spec = msgspec.json.decode(text, type=EngineSpec)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"the engine spec cannot be read: {error}") from error
    if spec.max_running < 1 or spec.session_len < 1:
        raise ConfigurationError("max_running and session_len must be at least 1")
    return spec


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vlmq-engine", description="One replica of one model.")
    parser.add_argument("--engine", required=True, help="short name or module:Class")
    parser.add_argument("--socket", required=True, type=Path, help="where to listen")
    parser.add_argument("--replica", required=True, type=int, help="number of this replica")
    parser.add_argument("--spec", default="-", help="EngineSpec as JSON: a file, or - for stdin")
    parser.add_argument("--max-waiting", type=int, default=HostOptions.max_waiting)
    parser.add_argument("--max-waiting-bytes", type=int, default=HostOptions.max_waiting_bytes)
    parser.add_argument("--drain-limit-s", type=float, default=HostOptions.drain_limit_s)
    parser.add_argument("--warm-up-limit-s", type=float, default=HostOptions.warm_up_limit_s)
    parser.add_argument("--parent", type=int, help="process id of the parent, to die with it")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the engine process and return its exit status."""
    args = _parse(arguments)
    die_with_parent(args.parent)
    configure("engine")
    try:
        options = HostOptions(
            engine=args.engine,
            socket=args.socket,
            replica=args.replica,
            spec=read_spec(args.spec),
            max_waiting=args.max_waiting,
            max_waiting_bytes=args.max_waiting_bytes,
            drain_limit_s=args.drain_limit_s,
            warm_up_limit_s=args.warm_up_limit_s,
        )
        return asyncio.run(serve(find_engine(args.engine), options))
    except (ConfigurationError, EngineSetupFailed, RemoteCodeRefused) as error:
        where = f"engine '{args.engine}', replica {args.replica}"
        sys.stderr.write(f"{where}: {' '.join(error.message.split())}\n")
        return EXIT_PERMANENT


if __name__ == "__main__":
    sys.exit(main())
