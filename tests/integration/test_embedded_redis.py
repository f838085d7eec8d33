"""The embedded Valkey: which program is chosen, how it runs, what survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.connection import connect
from shared.errors import ConfigurationError
from shared.settings import Settings, load_settings, with_overrides
from workers import redis_server


@pytest.fixture
def settings() -> Iterator[Settings]:
    """Settings below a short temporary folder."""
    with tempfile.TemporaryDirectory(prefix="vlmq-") as folder:
        (Path(folder) / "run").mkdir()
        places = {"data_dir": f"{folder}/data", "run_dir": f"{folder}/run"}
        yield load_settings(None, storage=places)


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Started servers; killed afterwards."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        server.kill()
        server.wait()


def start(settings: Settings, servers: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start the server as a node does, and wait until it answers."""
    with redis_server.lock_data(settings) as lock:
        server = subprocess.Popen(
            redis_server.command(settings), stdout=subprocess.DEVNULL, pass_fds=(lock.fileno(),)
        )
    servers.append(server)
    deadline = time.monotonic() + 20
    while not redis_server.answers(redis_server.socket_path(settings)):
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return server


def program(folder: Path, name: str, answer: str) -> str:
    """An executable that prints ``answer``."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    path.chmod(0o700)
    return str(path)


def test_what_was_written_survives_kill_9(
    settings: Settings, servers: list[subprocess.Popen[bytes]]
) -> None:
    """Given a value, when the server is killed and started again, then the value is there."""
    server = start(settings, servers)
    client = connect(settings)
    client.set("vlmq:test", b"kept")
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert not redis_server.answers(redis_server.socket_path(settings))
    start(settings, servers)
    assert client.get("vlmq:test") == b"kept"
    client.close()


def test_it_is_set_up_to_lose_nothing_and_to_be_private(
    settings: Settings, servers: list[subprocess.Popen[bytes]]
) -> None:
    """Append-only, never evicting, no TCP port, a socket for this user only."""
    start(settings, servers)
    client = connect(settings)
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "port": "0",
    }
    for name, value in wanted.items():
        assert client.config_get(name) == {name: value}
    client.close()
    mode = redis_server.socket_path(settings).stat().st_mode
    assert mode & 0o077 == 0


def test_a_second_server_on_the_same_data_is_refused(
    settings: Settings, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a running server, even one whose node is gone, then its folder is not given away."""
    server = start(settings, servers)
    elsewhere = with_overrides(settings, storage={"run_dir": str(settings.run_dir / "other")})
    with pytest.raises(ConfigurationError, match="already uses"):
        redis_server.lock_data(elsewhere)
    server.terminate()
    assert server.wait(timeout=20) == 0
    redis_server.lock_data(elsewhere).close()


def test_a_configured_server_comes_first(settings: Settings, tmp_path: Path) -> None:
    """redis.server names the program, if it is one."""
    chosen = program(tmp_path, "mine", "Redis server v=7.2.4 sha=0")
    picky = with_overrides(settings, redis={"server": chosen})
    assert redis_server.find_server(picky) == chosen
    old = with_overrides(settings, redis={"server": program(tmp_path, "old", "Redis v=6.0.16")})
    with pytest.raises(ConfigurationError, match="version 7"):
        redis_server.find_server(old)
    lost = with_overrides(settings, redis={"server": str(tmp_path / "none")})
    with pytest.raises(ConfigurationError, match="no program"):
        redis_server.find_server(lost)


def test_a_system_server_is_used_if_it_is_new_enough(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old redis-server on PATH is passed over, a new valkey-server is taken."""
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "redis-server", "Redis server v=6.0.16 sha=0")
    bundled = redis_server.find_server(settings)
    assert bundled.endswith("valkey-server")
    assert not bundled.startswith(str(tmp_path))
    assert os.access(bundled, os.X_OK)
    system = program(tmp_path, "valkey-server", "Valkey server v=8.1.0 sha=0")
    assert redis_server.find_server(settings) == system


def test_nobody_there_is_not_an_answer(tmp_path: Path) -> None:
    """A socket that does not exist does not answer."""
    assert not redis_server.answers(tmp_path / "none.sock")
