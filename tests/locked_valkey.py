"""A Valkey that asks for a password, started as the deployment starts it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.process import free_port
from shared.settings import load_settings
from tests.running_node import wait_for
from workers import redis_server

DEPLOY = Path(__file__).parents[1] / "deploy"
PASSWORD = "s3cret-of-the-queue"


@dataclass
class LockedValkey:
    """Where it is, and the file with its password."""

    port: int
    password_file: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Without the password."""
        return self.database(0)

    def database(self, number: int) -> str:
        """The URL of one of its databases, without the password."""
        return f"redis://127.0.0.1:{self.port}/{number}"

    def url_with(self, password: str) -> str:
        """With one, right or wrong."""
        return self.url.replace("redis://", f"redis://:{password}@")

    def answers(self) -> bool:
        """Whether it speaks (if only to ask for the password)."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"-NOAUTH")
        except OSError:
            return False

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.process.terminate()
        self.process.wait(timeout=20)


@contextlib.contextmanager
def running_locked_valkey() -> Iterator[LockedValkey]:
    """``deploy/valkey/start.sh`` with ``deploy/valkey/valkey.conf``, on a free port."""
    with tempfile.TemporaryDirectory(prefix="vlmq-locked-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        password_file = folder / "password"
        password_file.write_text(f"{PASSWORD}\n")
        server = redis_server.find_server(load_settings())
        (folder / "bin").mkdir()
        (folder / "bin" / "valkey-server").symlink_to(server)
        port = free_port()
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [
                    *("sh", str(DEPLOY / "valkey" / "start.sh")),
                    *(str(DEPLOY / "valkey" / "valkey.conf"), str(password_file)),
                    *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder / "data")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
            )
        valkey = LockedValkey(port, password_file, process)
        try:
            wait_for(valkey.answers, "Valkey", 20, (folder / "log").read_text)
            yield valkey
        finally:
            valkey.stop()
