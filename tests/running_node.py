"""A whole node for tests: the real programs, started as ``vlmq`` starts them, and their pids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from shared.process import free_port, parent_of
from shared.settings import NodeSettings, Settings, load_settings
from shared.stores import Stores

if TYPE_CHECKING:
    import openai

ECHO = {"model": "echo", "engine": "echo", "options": {"faults": True}}
USUAL_ROLES = NodeSettings.model_fields["roles"].default
"""Of a node unless its owner says otherwise."""
ROLES = tuple(role for role in USUAL_ROLES if role != "finetune")
"""Of a node unless its test says otherwise: fine-tunes are left out, for most tests have none."""
START_LIMIT_S = 60.0


@dataclass
class RunningNode:
    """A node in a folder of its own, with an HTTP port of its own."""

    folder: Path
    settings: Settings
    config: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    _stores: list[Stores] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        """What an SDK is pointed at."""
        return f"http://127.0.0.1:{self.port}/v1"

    def sdk(self, api_key: str = "unused", **options: Any) -> openai.OpenAI:
        """The unmodified SDK."""
        # Only here, so that nodes can be started where the SDK is not installed.
        import openai

        return openai.OpenAI(base_url=self.base_url, api_key=api_key, **options)

    @property
    def stores(self) -> Stores:
        """Stores beside the node's own."""
        if not self._stores:
            self._stores.append(Stores.connect(self.settings))
        return self._stores[0]

    def start(self) -> None:
        """Start the node and wait until it serves everything."""
        self.launch()
        wait_for(self.is_up, "the node to be up", START_LIMIT_S, self.story)

    def launch(self) -> None:
        """Start the node; ``is_up`` says when it serves."""
        log = open(self.folder / "node.log", "ab")  # noqa: SIM115 - the child keeps it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.node", "--config", str(self.config)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()

    def refused(self) -> subprocess.CompletedProcess[str]:
        """Start another node with the same configuration, which ends by itself."""
        return subprocess.run(
            [sys.executable, "-m", "workers.node", "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def vlmq(self, *arguments: str) -> subprocess.Popen[str]:
        """``vlmq ARGUMENTS`` against this node."""
        return subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLMQ_URL": self.base_url, "COLUMNS": "200"},
        )

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def end(self) -> None:
        """Stop it as a person does who cannot wait: Ctrl-C again and again."""
        assert self.process is not None
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the node does not end:\n{self.story()}"
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.1)

    def close(self) -> None:
        """Stop everything and delete the folder."""
        for stores in self._stores:
            stores.close()
        if self.process is not None:
            self.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pids(self, *words: str) -> list[int]:
        """This node's processes whose command line holds all ``words``."""
        marker = f"VLMQ_RUN_DIR={self.settings.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # Valkey writes its title over its environment, and the title names its socket.
            is_ours = marker in environment or str(self.settings.run_dir) in command
            if is_ours and all(word in command for word in words):
                found.append(int(entry.name))
        return sorted(found)

    def batch_children(self) -> list[int]:
        """The prefork children of the batch consumer, which do the work."""
        consumers = set(self.pids("workers.consumer batch"))
        return [pid for pid in consumers if parent_of(pid) in consumers]

    def engine_pids(self) -> list[int]:
        """The engine processes."""
        return self.pids("workers.inference.engines.host")

    def redis_pid(self) -> int:
        """The embedded Valkey."""
        [pid] = self.pids("valkey-server")
        return pid

    def is_up(self) -> bool:
        """Whether some replica of every model answers. Raises: AssertionError if the node exited."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the node exited with {self.process.returncode}:\n{self.story()}")
        try:
            if httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5).status_code != 200:
                return False
        except httpx.TransportError:
            return False
        return all(self.stores.presence.obtainable(s.model) for s in self.settings.node.serve)

    def story(self) -> str:
        """The end of what the node told."""
        return (self.folder / "node.log").read_text()[-4000:]


def wait_for(
    condition: Callable[[], bool],
    what: str,
    limit_s: float,
    explain: Callable[[], str] = lambda: "",
) -> None:
    """Wait until ``condition`` holds; fails the test after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s:.0f} s for {what}\n{explain()}")
        time.sleep(0.05)


@contextlib.contextmanager
def running_node(
    *,
    models: tuple[dict[str, Any], ...] = (ECHO,),
    checkpoints: dict[str, Path] | None = None,
    trust_remote_code: bool = False,
    start: bool = True,
    **sections: dict[str, Any],
) -> Iterator[RunningNode]:
    """A node that serves ``models``; ``sections`` are settings by section."""
    folder = Path(tempfile.mkdtemp(prefix="vlmq-test-"))
    port = free_port()
    values: dict[str, Any] = {
        **sections,
        "storage": {
            "data_dir": str(folder / "data"),
            "run_dir": str(folder / "run"),
            **sections.get("storage", {}),
        },
        "api": {"port": port, **sections.get("api", {})},
        "node": {
            "name": f"test-{os.getpid()}",
            "roles": list(ROLES),
            "serve": [dict(model) for model in models],
            **sections.get("node", {}),
        },
    }
    config = folder / "node.json"
    config.write_text(json.dumps(values))
    node = RunningNode(folder, load_settings(config), config, port)
    try:
        for model in models:
            path = (checkpoints or {}).get(model["model"])
            node.stores.models.link(
                model["model"], path, engine=model["engine"], trust_remote_code=trust_remote_code
            )
        if start:
            node.start()
        yield node
    finally:
        node.close()
