"""Real engine processes for tests, what they answered, and a bare client that can misbehave."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from shared.errors import VlmqError
from workers.inference.engines import wire
from workers.inference.engines.base import (
    Answer,
    Completion,
    Delta,
    EngineSpec,
    Prompt,
    Sampling,
    Turn,
)
from workers.inference.engines.client import EngineClient, Expected
from workers.inference.engines.flight import Flight

M = TypeVar("M", bound=wire.FromHost)

MODEL = "demo/model"
PATIENCE_S = 30.0
LOADING_S = 110.0
"""How long a model may take to load; one on a GPU takes about a minute."""


def ask(text: str, prompt_id: int = 1, **sampling: Any) -> Prompt:
    """A prompt of one user turn."""
    return Prompt(prompt_id, [Turn("user", [text])], Sampling(**sampling))


def wait_for(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until ``condition`` holds; fail the test after a long while."""
    deadline_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.01)


def everything(flight: Flight) -> dict[int, Completion | VlmqError]:
    """Wait until nothing is in flight; fail if an id comes twice."""
    answers: list[Answer] = []
    while flight.in_flight:
        got = flight.results(PATIENCE_S)
        assert got, "no answer came"
        answers += got
    answers += flight.results(0)
    assert len(dict(answers)) == len(answers)
    return dict(answers)


class Stream:
    """Records what a streamed request got."""

    def __init__(
        self,
        client: EngineClient,
        text: str,
        prompt_id: int = 1,
        *,
        lane: wire.Lane = "chat",
        expected: Expected | None = None,
    ) -> None:
        self.deltas: list[Delta] = []
        self.ends: list[VlmqError | None] = []
        self.first = threading.Event()
        self.ended = threading.Event()
        prompt = ask(text, prompt_id)
        self.handle = client.stream(prompt, self._delta, self._end, lane, expected=expected)

    def result(self) -> VlmqError | None:
        """Wait for the end and return how it ended."""
        assert self.ended.wait(PATIENCE_S)
        assert len(self.ends) == 1
        return self.ends[0]

    def _delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.first.set()

    def _end(self, error: VlmqError | None) -> None:
        self.ends.append(error)
        self.ended.set()


class HostProcess:
    """One ``workers.inference.engines.host`` process."""

    def __init__(
        self,
        run_dir: Path,
        replica: int = 0,
        *,
        engine: str = "echo",
        max_waiting: int = 4096,
        max_waiting_bytes: int = 256 << 20,
        drain_limit_s: float = 20.0,
        warm_up_limit_s: float = 300.0,
        spec: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.socket = wire.socket_path(run_dir, MODEL, replica)
        settings = EngineSpec(model=MODEL, options=options or {}, **(spec or {}))
        command = [sys.executable, "-m", "workers.inference.engines.host", "--engine", engine]
        command += ["--socket", str(self.socket), "--replica", str(replica)]
        command += ["--max-waiting", str(max_waiting), "--drain-limit-s", str(drain_limit_s)]
        command += ["--warm-up-limit-s", str(warm_up_limit_s)]
        command += ["--max-waiting-bytes", str(max_waiting_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(settings).decode())
        self.process.stdin.close()
        self.process.stdin = None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def until_ready(self) -> HostProcess:
        """Wait for this process to accept connections on its socket, not for a stale file."""
        wait_for(self._answers, "the engine process to get ready", LOADING_S)
        return self

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def terminate(self) -> None:
        """Ask it to drain."""
        self.process.send_signal(signal.SIGTERM)

    def status(self) -> int:
        """Wait for it to end and return its exit status."""
        return self.process.wait(PATIENCE_S)

    def errors(self) -> str:
        """What it wrote to standard error; call it after the end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        """End it, whatever it does."""
        self.kill()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the engine process ended: {self.errors()}"
        if not self.socket.exists():
            return False
        try:
            with RawClient(self.socket) as client:
                return client.hello.pid == self.pid
        except OSError:
            return False


class RawClient:
    """A connection that speaks the protocol, or breaks it, by hand."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        self._frames = wire.frames_from_host()
        self._unread: list[wire.FromHost] = []
        try:
            self.socket.connect(str(path))
            self.hello = self.expect(wire.Hello)
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, message: wire.ToHost) -> None:
        """Send one message."""
        self.socket.sendall(wire.encode(message))

    def receive(self) -> wire.FromHost:
        """The next message. Raises: ConnectionResetError at the end of the stream."""
        while not self._unread:
            data = self.socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("hung up")
            self._unread = self._frames.feed(data)
        return self._unread.pop(0)

    def expect(self, kind: type[M]) -> M:
        """The next message of a kind; others before it are dropped."""
        while True:
            message = self.receive()
            if isinstance(message, kind):
                return message
