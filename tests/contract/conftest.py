"""Engines and engine processes for the contract suite."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.hosts import HostProcess
from workers.inference.engines.base import Engine, EngineSpec
from workers.inference.engines.host import find_engine
from workers.inference.tiny import CHECKPOINT

SESSION_LEN = 512

StartHost = Callable[..., HostProcess]


@dataclass(frozen=True)
class Kind:
    """One engine under the contract.

    ``lasting`` is a text whose answer takes so long that a test can step in;
    ``reads_images`` says whether broken image bytes are noticed.
    """

    name: str
    engine: str
    spec: EngineSpec
    lasting: str
    reads_images: bool = False

    def make(self) -> Engine:
        """A new engine, not set up."""
        return find_engine(self.engine)(self.spec)

    def host_settings(self) -> dict[str, Any]:
        """What an engine process of this kind is started with."""
        given = msgspec.structs.asdict(self.spec)
        wanted = ("path", "session_len", "trust_remote_code")
        return {
            "engine": self.engine,
            "spec": {name: given[name] for name in wanted},
            "options": dict(self.spec.options),
        }


WORDS = " ".join(f"word{number}" for number in range(300))

KINDS = [
    Kind(
        "echo",
        "echo",
        EngineSpec("m", session_len=SESSION_LEN, options={"faults": True}),
        lasting="one [[echo:sleep=60]]",
    ),
    Kind(
        "echo word by word",
        "echo",
        EngineSpec("m", session_len=SESSION_LEN, options={"token_delay_s": 0.003}),
        lasting=WORDS,
    ),
    Kind(
        "transformers",
        "transformers",
        EngineSpec("m", path=str(CHECKPOINT), session_len=SESSION_LEN),
        lasting="what is in this image",
        reads_images=True,
    ),
    *[
        Kind(
            f"lmdeploy {backend}",
            "lmdeploy",
            EngineSpec(
                "m",
                session_len=SESSION_LEN,
                trust_remote_code=True,
                # Two engines fit on one GPU, for the test that closes one of its own.
                options={"backend": backend, "cache_max_entry_count": 0.2},
            ),
            lasting="what is in this image",
            reads_images=True,
        )
        for backend in ("turbomind", "pytorch")
    ],
]


def has_gpu() -> bool:
    """Whether torch is there and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    torch = importlib.import_module("torch")
    return bool(torch.cuda.is_available())


def needs(kind: Kind) -> None:
    """Skip where an engine's libraries or model are not there; in CI that is a failure."""
    if kind.engine == "lmdeploy" and not has_gpu():
        pytest.skip("no GPU")
    if kind.engine != "transformers":
        return
    missing = ""
    if importlib.util.find_spec("torch") is None:
        missing = "torch is not installed"
    elif not (CHECKPOINT / "config.json").exists():
        missing = "the tiny checkpoint is not there"
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def walking_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model for a GPU whose greedy answers do not hang on rounding."""
    from tests.gpu.walking_model import write_walking

    folder = tmp_path_factory.mktemp("models") / "walking"
    write_walking(folder, with_code=True)
    return str(folder)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each engine in turn."""
    chosen: Kind = request.param
    needs(chosen)
    if chosen.engine == "lmdeploy":
        path = request.getfixturevalue("walking_model")
        return replace(chosen, spec=msgspec.structs.replace(chosen.spec, path=path))
    return chosen


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for a module, because an engine lives on one."""
    with asyncio.Runner() as running:
        yield running


@pytest.fixture(scope="module")
def engine(kind: Kind, runner: asyncio.Runner) -> Iterator[Engine]:
    """An engine that is set up once and asked by every test of the module."""
    made = kind.make()
    runner.run(made.setup())
    yield made
    runner.run(made.close())


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder for sockets, with a path short enough for them."""
    folder = Path(tempfile.mkdtemp(prefix="vlmq-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start_host(run_dir: Path) -> Iterator[StartHost]:
    """Start engine processes that end with the test; they are ready when this returns."""
    hosts: list[HostProcess] = []

    def start(replica: int = 0, *, ready: bool = True, **settings: Any) -> HostProcess:
        host = HostProcess(run_dir, replica, **settings)
        hosts.append(host)
        return host.until_ready() if ready else host

    yield start
    for host in hosts:
        host.close()
