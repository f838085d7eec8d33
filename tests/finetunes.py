"""Fine-tunes for tests: data, jobs straight into the store, and nodes that run them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from shared.clock import unix_now
from shared.errors import QueueUnavailable
from shared.finetunes import (
    DataSource,
    Finetune,
    FinetuneEvent,
    FinetuneSpec,
    FinetuneState,
    Recipe,
)
from shared.ids import new_id
from shared.stores import Stores
from tests import stand_in_trainer
from tests.running_node import RunningNode, running_node, wait_for
from workers.inference.tiny import CHECKPOINT
from workers.strays import find_strays
from workers.training.process import JOB_MARK

OWNER = "local"
BASE = "tiny"
TINY = {"model": BASE, "engine": "transformers"}
QUEUE = {"lease_ttl_s": 6, "renew_s": 1, "reap_s": 0.5, "drain_s": 5}
LIMIT_S = 60.0


def rows(count: int = 24) -> bytes:
    """Rows in OpenAI's chat format, each with a picture of a colour of its own."""
    lines = []
    for number in range(count):
        picture = io.BytesIO()
        Image.new("RGB", (64, 48), (number * 9 % 256, 80, 200)).save(picture, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        asked = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Describe the image."},
        ]
        answer = {"role": "assistant", "content": f"colour {number}"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": asked}, answer]}))
    return "".join(f"{line}\n" for line in lines).encode()


def upload(stores: Stores, content: bytes, filename: str = "rows.jsonl") -> str:
    """An owner's file."""
    with stores.files.begin(owner=OWNER, filename=filename, purpose="fine-tune") as writer:
        writer.write(content)
        return writer.commit().id


def create(
    stores: Stores,
    *,
    content: bytes | None = None,
    data: dict[str, Any] | None = None,
    config: str | None = None,
    **recipe: Any,
) -> Finetune:
    """A job of a few dozen steps; ``recipe`` and ``data`` say otherwise, ``config`` is a file's."""
    file_id = upload(stores, rows() if content is None else content)
    return stores.finetunes.create(
        FinetuneSpec(
            id=new_id("ftjob-"),
            owner=OWNER,
            model=BASE,
            created_at=unix_now(),
            seed=7,
            data=DataSource(training_file=file_id, **(data or {})),
            config_file=None if config is None else upload(stores, config.encode(), "config.py"),
            recipe=Recipe(**{"n_epochs": 10, "batch_size": 4, "save_every": 10, **recipe}),
        )
    )


class Running:
    """A node that runs fine-tunes, and what tests ask about them."""

    def __init__(self, node: RunningNode, interpreter: Path | None) -> None:
        self.node = node
        self.interpreter = interpreter
        self.stores = node.stores

    def get(self, job_id: str) -> Finetune:
        """The job as it is now."""
        return self.stores.finetunes.get(OWNER, job_id)

    def events(self, job_id: str) -> list[FinetuneEvent]:
        """Everything that happened, oldest first."""
        return self.stores.finetunes.events(OWNER, job_id, limit=10_000).items[::-1]

    def messages(self, job_id: str) -> str:
        """What people are told of it."""
        return "\n".join(event.message for event in self.events(job_id) if event.type == "message")

    def losses(self, job_id: str) -> dict[int, float]:
        """The loss after each step that was told of."""
        found = [event.data for event in self.events(job_id) if event.type == "metrics"]
        steps = [data["step"] for data in found]
        assert steps == sorted(set(steps))
        return {data["step"]: data["train_loss"] for data in found}

    def wait(
        self,
        job_id: str,
        condition: Callable[[Finetune], bool],
        what: str,
        limit_s: float = LIMIT_S,
    ) -> Finetune:
        """Wait until the job is so; fails at once if it has ended otherwise."""

        def holds() -> bool:
            job = self.get(job_id)
            if condition(job):
                return True
            assert not job.is_terminal, self.explain(job_id)
            return False

        wait_for(holds, what, limit_s, lambda: self.explain(job_id))
        return self.get(job_id)

    def wait_state(self, job_id: str, *states: FinetuneState, limit_s: float = LIMIT_S) -> Finetune:
        """Wait until the job is in one of these states."""
        return self.wait(job_id, lambda job: job.state in states, " or ".join(states), limit_s)

    def wait_step(self, job_id: str, step: int, limit_s: float = LIMIT_S) -> Finetune:
        """Wait until training has got so far."""
        return self.wait(job_id, lambda job: job.progress.step >= step, f"step {step}", limit_s)

    def explain(self, job_id: str) -> str:
        """Everything that helps to see why a wait was in vain."""
        folder = self.stores.finetunes.path(job_id)
        logs = [path.read_text()[-1500:] for path in sorted(folder.glob("work/*/*.log"))]
        node_logs = [
            path.read_text()[-3000:]
            for path in self.node.settings.data_dir.glob("logs/*/finetune.log")
        ]
        job = self.get(job_id)
        return "\n".join([repr(job), self.messages(job_id), *logs, *node_logs, self.node.story()])

    def consumer_pid(self) -> int:
        """The fine-tune consumer."""
        [pid] = self.node.pids("workers.consumer finetune")
        return pid

    def supervisor_pid(self, job_id: str) -> int:
        """The supervisor of a job's trainer."""
        [pid] = self._with("workers.training.supervisor", job_id)
        return pid

    def trainer_pid(self, job_id: str) -> int:
        """The trainer of a job."""
        supervisor = self.supervisor_pid(job_id)
        [pid] = [pid for pid in self._with("workers.training.trainer", job_id) if pid != supervisor]
        return pid

    def processes(self, job_id: str) -> list[int]:
        """Whatever carries the job's mark."""
        return find_strays(job_id, JOB_MARK)

    def _with(self, word: str, job_id: str) -> list[int]:
        found = []
        for pid in self.processes(job_id):
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self, pid: int) -> None:
        """kill -9."""
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def training_node(
    *,
    roles: tuple[str, ...] = ("redis", "reaper", "finetune"),
    models: tuple[dict[str, Any], ...] = (TINY,),
    base: Path = CHECKPOINT,
    real: bool = False,
    started: bool = True,
    **sections: Any,
) -> Iterator[Running]:
    """A node with the tiny base linked, which trains with the stand-in unless ``real``.

    With the role ``api`` it is waited for until it serves, else until the consumer is up.
    """
    finetune = {"stop_s": 20, **sections.pop("finetune", {})}
    with running_node(
        models=models,
        checkpoints={BASE: base},
        start=False,
        queue=QUEUE,
        node={"roles": list(roles), **sections.pop("node", {})},
        finetune=finetune,
        **sections,
    ) as node:
        interpreter = None
        if not real:
            interpreter = stand_in_trainer.install(node.folder)
            text = json.loads(node.config.read_text())
            text["finetune"]["python"] = str(interpreter)
            node.config.write_text(json.dumps(text))
        running = Running(node, interpreter)
        if all(model["model"] != BASE for model in models):
            running.stores.models.link(BASE, base, engine="transformers")
        if started:
            start(running)
        yield running


def start(running: Running) -> None:
    """Start the node (again) and wait until its consumer takes jobs."""
    node = running.node
    if "api" in node.settings.node.roles:
        node.start()
    else:
        node.launch()
    wait_for(lambda: _consumer_is_ready(running.stores), "the consumer", LIMIT_S, node.story)


def _consumer_is_ready(stores: Stores) -> bool:
    with contextlib.suppress(QueueUnavailable):  # the node starts it just now
        return any(report.programs.get("finetune") == "ready" for report in stores.presence.nodes())
    return False
