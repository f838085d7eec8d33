"""Fixtures for all tests: real programs only."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.settings import Settings, load_settings, with_overrides
from shared.stores import Stores
from tests.locked_valkey import LockedValkey, running_locked_valkey
from tests.running_node import RunningNode, running_node, wait_for
from workers import redis_server


def pytest_configure() -> None:
    """Let the programs of tests hear Ctrl-C, also if these tests run in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def node() -> Iterator[RunningNode]:
    """One node that serves the model ``echo``, shared by tests that break nothing."""
    with running_node() as running:
        yield running


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """A Valkey alone, run as a node would run it, for tests of the stores."""
    # Short, because a Unix socket's path has room for about 100 bytes.
    with tempfile.TemporaryDirectory(prefix="vlmq-redis-") as name:
        storage = {"data_dir": f"{name}/data", "run_dir": f"{name}/run"}
        settings = load_settings(storage=storage)
        settings.run_dir.mkdir(mode=0o700)
        redis_server.data_folder(settings).mkdir(mode=0o700, parents=True)
        with open(f"{name}/log", "wb") as log:
            server = subprocess.Popen(redis_server.command(settings), stdout=log, stderr=log)
        try:
            socket = redis_server.socket_path(settings)
            wait_for(lambda: redis_server.answers(socket), "Valkey", 20)
            yield settings.redis_url
        finally:
            server.terminate()
            server.wait(timeout=20)


@pytest.fixture(scope="session")
def locked_valkey() -> Iterator[LockedValkey]:
    """A Valkey with a password, shared by tests that leave both as they were."""
    with running_locked_valkey() as valkey:
        yield valkey


@pytest.fixture
def redis_url(redis_server_url: str, tmp_path: Path) -> str:
    """The same Valkey, emptied."""
    with connected(store_settings(redis_server_url, tmp_path)) as stores:
        stores.redis.flushall()
    return redis_server_url


@pytest.fixture
def own_stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """All stores on an empty Valkey and an empty folder."""
    with connected(store_settings(redis_url, tmp_path)) as found:
        yield found


def store_settings(redis_url: str, folder: Path, **sections: dict[str, Any]) -> Settings:
    """Settings of stores in ``folder``, with nothing reserved; ``sections`` by name."""
    storage = {
        "data_dir": str(folder / "data"),
        "run_dir": str(folder / "run"),
        "min_free_bytes": 0,
        **sections.pop("storage", {}),
    }
    return with_overrides(Settings(), storage=storage, redis={"url": redis_url}, **sections)


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[Stores]:
    """Stores for a block."""
    found = Stores.connect(settings)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder for one test's records."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder
