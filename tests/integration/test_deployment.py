"""The commands of compose.yaml as processes: API and worker beside a Valkey with a password."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cli.main import run
from shared.clock import unix_now
from shared.presence import NodeReport, ReplicaReport
from shared.process import free_port
from shared.settings import load_settings
from tests.conftest import connected
from tests.locked_valkey import DEPLOY, PASSWORD, LockedValkey, running_locked_valkey
from tests.running_node import wait_for

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
PROGRAMS = {"python": sys.executable, "vlmq": str(Path(sys.executable).with_name("vlmq"))}
NODE = "gpu-1"


@dataclass
class Deployment:
    """What the containers of one machine would have, in a folder."""

    folder: Path
    port: int
    environment: dict[str, str]

    def command(self, words: list[str]) -> list[str]:
        """A command of compose.yaml, with this folder's configuration and this port."""
        here = {
            "/etc/vlmq/node.toml": str(DEPLOY / "node.toml"),
            "http://127.0.0.1:8000": f"http://127.0.0.1:{self.port}",
            **PROGRAMS,
        }
        return [here.get(word, word) for word in words]

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """The service's command; its output goes to a file named like it."""
        with open(self.folder / f"{service}.log", "wb") as log:
            return subprocess.Popen(
                self.command(SERVICES[service]["command"]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command to its end, with the services' environment."""
        return subprocess.run(
            self.command(list(words)),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=60,
            check=False,
        )

    def health(self, service: str) -> subprocess.CompletedProcess[str]:
        """The service's health check."""
        kind, *words = SERVICES[service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(*words)

    def is_healthy(self, service: str) -> bool:
        """Whether the health check passes."""
        return self.health(service).returncode == 0

    def said(self) -> str:
        """The output of the services, for whoever wonders why a test failed."""
        return "\n".join(path.read_text()[-3000:] for path in self.folder.glob("*.log"))


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[tuple[Deployment, LockedValkey]]:
    """A Valkey that runs, and everything to start the other services beside it."""
    with running_locked_valkey() as valkey:
        port = free_port()
        # What the images, the mounts and .env say inside containers.
        environment = {
            **os.environ,
            "VLMQ_STORAGE__DATA_DIR": str(tmp_path / "data"),
            "VLMQ_STORAGE__RUN_DIR": str(tmp_path / "run"),
            "VLMQ_STORAGE__MIN_FREE_BYTES": "0",
            "VLMQ_REDIS__URL": valkey.url,
            "VLMQ_REDIS__PASSWORD_FILE": str(valkey.password_file),
            "VLMQ_API__HOST": "127.0.0.1",
            "VLMQ_API__PORT": str(port),
            "VLMQ_NODE__NAME": NODE,
            "VLMQ_NODE__BATCH_PROCESSES": "1",
            "VLMQ_NODE__SERVE": '[{"model": "echo", "engine": "echo"}]',
        }
        yield Deployment(tmp_path, port, environment), valkey


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens in the block, the processes do not outlive it."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def test_the_services_work_together_and_their_health_checks_tell(
    deployment: tuple[Deployment, LockedValkey],
) -> None:
    """Given api and worker as in compose.yaml, then chat and batch are answered with a key.

    The health checks pass as long as that is so, and the password shows nowhere.
    """
    here, valkey = deployment
    assert not here.is_healthy("api")
    key = here.run("vlmq", "keys", "create", "ann").stdout.strip()
    api, worker = here.start("api"), here.start("worker")
    with ended(api, worker):
        for service in ("api", "worker"):
            wait_for(lambda: here.is_healthy(service), f"{service} healthy", 60, here.said)  # noqa: B023
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{here.port}/v1", api_key=key)
        question: Any = [{"role": "user", "content": "two words"}]
        answer = client.chat.completions.create(model="echo", messages=question)
        assert answer.choices[0].message.content == "two words"
        _run_a_batch(here, key)
        _assert_the_password_is_hidden(here)

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=60) == 0
        sick = here.health("worker")
        assert sick.returncode == 1
        assert f"no node '{NODE}' has reported" in sick.stderr
        assert here.is_healthy("api")

        valkey.stop()
        assert not here.is_healthy("api")
        assert "Redis does not answer" in here.health("worker").stderr


def _run_a_batch(here: Deployment, key: str) -> None:
    requests = here.folder / "requests.jsonl"
    requests.write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": '
        '{"model": "echo", "messages": [{"role": "user", "content": "from a batch"}]}}\n'
    )
    url = f"http://127.0.0.1:{here.port}"
    server = ("--url", url, "--api-key", key)
    submitted = here.run("vlmq", "batch", "submit", str(requests), "--watch", *server)
    assert submitted.returncode == 0, submitted.stderr + here.said()
    assert "completed" in submitted.stdout + submitted.stderr


def _assert_the_password_is_hidden(here: Deployment) -> None:
    """No process shows it, and no file of data, sockets or logs holds it."""
    mark = f"VLMQ_STORAGE__RUN_DIR={here.environment['VLMQ_STORAGE__RUN_DIR']}".encode()
    shown = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and mark in (process / "environ").read_bytes():
                shown += [(process / name).read_bytes() for name in ("cmdline", "environ")]
    assert len(shown) > 8, "api, node, reaper, consumers, engine"
    files = [path for path in here.folder.rglob("*") if path.is_file()]
    assert any(path.name == "settings.json" for path in files)
    shown += [path.read_bytes() for path in files]
    assert not any(PASSWORD.encode() in text for text in shown)


def test_a_worker_without_its_secret_says_so(
    deployment: tuple[Deployment, LockedValkey],
) -> None:
    """Rather than starting and failing at every request."""
    here, valkey = deployment
    valkey.password_file.unlink()
    for service, status in (("worker", 1), ("api", 2)):
        process = here.start(service)
        with ended(process):
            assert process.wait(timeout=60) == status
        assert "redis.password_file: cannot read" in here.said()
        (here.folder / f"{service}.log").unlink()


@pytest.mark.parametrize(
    ("programs", "replicas", "status"),
    [
        ({"chat": "ready"}, [("ready", "")], 0),
        ({"chat": "ready"}, [("ready", ""), ("failed", "no such GPU")], 1),
        ({"chat": "ready"}, [("starting", "")], 1),
        ({"chat": "restarting"}, [("ready", "")], 1),
    ],
)
def test_a_node_is_as_well_as_its_programs(
    locked_valkey: LockedValkey,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    programs: dict[str, str],
    replicas: list[tuple[Any, str]],
    status: int,
) -> None:
    """``vlmq health`` names each that is not ready, of this node only."""
    monkeypatch.setenv("VLMQ_STORAGE__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("VLMQ_REDIS__URL", locked_valkey.url)
    monkeypatch.setenv("VLMQ_REDIS__PASSWORD_FILE", str(locked_valkey.password_file))
    monkeypatch.setenv("VLMQ_NODE__NAME", NODE)
    reports = [ReplicaReport("m", n, state, detail=why) for n, (state, why) in enumerate(replicas)]
    with connected(load_settings()) as stores:
        stores.presence.announce(NodeReport(NODE, unix_now(), reports, programs))
        stores.presence.announce(NodeReport("another", unix_now(), [], {"chat": "failed"}))
        assert run(["health"]) == status
        stores.presence.forget(NODE)
        stores.presence.forget("another")
    said = capsys.readouterr()
    for name, state in [*programs.items(), *((f"m/{r.replica}", r.state) for r in reports)]:
        assert (f"{name} {state}" in said.err) == (state != "ready")
    assert "another" not in said.out + said.err


def test_a_model_that_is_loaded_on_demand_is_no_ailment(
    locked_valkey: LockedValkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``vlmq health`` passes while it is unloaded, and while it loads."""
    monkeypatch.setenv("VLMQ_STORAGE__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("VLMQ_REDIS__URL", locked_valkey.url)
    monkeypatch.setenv("VLMQ_REDIS__PASSWORD_FILE", str(locked_valkey.password_file))
    monkeypatch.setenv("VLMQ_NODE__NAME", NODE)
    states: list[Any] = ["unloaded", "starting"]
    with connected(load_settings()) as stores:
        for state in states:
            reports = [ReplicaReport("m", 0, state)]
            said = NodeReport(NODE, unix_now(), reports, {"chat": "ready"}, obtainable=["m"])
            stores.presence.announce(said)
            assert run(["health"]) == 0
        stores.presence.forget(NODE)


def test_valkeys_health_check_needs_the_password(
    locked_valkey: LockedValkey, tmp_path: Path
) -> None:
    """``deploy/valkey/ping.sh`` passes with the right one only."""
    client = shutil.which("valkey-cli") or shutil.which("redis-cli")
    if client is None:
        pytest.skip("no valkey-cli or redis-cli here (Debian: apt install redis-tools)")
    # The image has valkey-cli and Valkey's port; this is another program on another port.
    program = tmp_path / "valkey-cli"
    program.write_text(f'#!/bin/sh\nexec {client} -p {locked_valkey.port} "$@"\n')
    program.chmod(0o755)
    wrong = tmp_path / "wrong"
    wrong.write_text("not it")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ping = ["sh", str(DEPLOY / "valkey" / "ping.sh")]
    for path, status in ((locked_valkey.password_file, 0), (wrong, 1)):
        checked = subprocess.run(
            [*ping, str(path)], env=environment, capture_output=True, timeout=20, check=False
        )
        assert checked.returncode == status, checked.stderr
