"""A fine-tune on a GPU that is serving: lent, trained on, given back; the result answers.

Needs a GPU, lmdeploy here, and ``vlmq[training]`` in the interpreter that the environment variable
VLMQ_FINETUNE__PYTHON names. The model is InternVL2-2B in full size with random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.gpu.nodes import replicas, start
from benchmarks.gpu.training_data import PHOTO_1024, write_rows
from benchmarks.gpu.work import MODEL as BASE
from benchmarks.gpu.work import Work, content_of, item_lines, write_input
from benchmarks.http_batches import BatchClient
from shared.errors import QueueUnavailable
from tests.contract.conftest import has_gpu
from tests.running_node import RunningNode, running_node, wait_for

TRAINING_PYTHON = os.environ.get("VLMQ_FINETUNE__PYTHON", "")
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(560),
    pytest.mark.skipif(not has_gpu(), reason="no GPU"),
    pytest.mark.skipif(not TRAINING_PYTHON, reason="VLMQ_FINETUNE__PYTHON names no interpreter"),
]

ROWS = 64
WORK = Work("1024", "1024x768", PHOTO_1024, detail="low", inline=True)
NEW_TOKENS = 12
LOAD_S, TRAIN_S, ANSWER_S = 120.0, 400.0, 120.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, with the code that published folders carry."""
    folder = tmp_path_factory.mktemp("base") / BASE
    add = "import sys; from benchmarks.gpu.published import add_published_code as add; "
    add += "from pathlib import Path; add(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-m", "benchmarks.gpu.prepare", str(folder)], check=True)
    subprocess.run([TRAINING_PYTHON, "-c", add, str(folder)], check=True)
    return folder


class Served:
    """A node that serves the base on the GPU that fine-tunes may take, asked over HTTP."""

    def __init__(self, node: RunningNode, photos: list[Path]) -> None:
        self.node = node
        self.photos = photos
        self.http = httpx.Client(base_url=node.base_url, timeout=ANSWER_S)
        self.batches = BatchClient(node.base_url)
        self._began = time.monotonic()

    def say(self, what: str) -> None:
        """What happened when, for whoever reads the output."""
        sys.stdout.write(f"[{time.monotonic() - self._began:4.0f} s] {what}\n")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST that must succeed."""
        response = self.http.post(path, json=body)
        assert response.is_success, response.text
        found: dict[str, Any] = response.json()
        return found

    def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET that must succeed."""
        response = self.http.get(path)
        assert response.is_success, response.text
        found: dict[str, Any] = response.json()
        return found

    def upload(self, name: str, content: bytes, purpose: str) -> str:
        """A file's id."""
        response = self.http.post(
            "files", data={"purpose": purpose}, files={"file": (name, content)}
        )
        assert response.is_success, response.text
        return str(response.json()["id"])

    def chat(self, model: str) -> httpx.Response:
        """Whatever a chat about a photo is answered with."""
        messages = [{"role": "user", "content": content_of(self.photos[0], WORK)}]
        body = {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
        return self.http.post("chat/completions", json=body)

    def batch(self, count: int) -> str:
        """A batch about so many photos."""
        lines = self.node.folder / "batch.jsonl"
        write_input(lines, item_lines(self.photos, WORK, count, NEW_TOKENS))
        return self.batches.submit(self.batches.upload(lines))

    def states(self, model: str) -> set[str]:
        """What the replicas of a model are doing."""
        try:
            return {one.state for one in replicas(self.node) if one.model == model}
        except QueueUnavailable:
            return set()

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float, job: str) -> None:
        """Wait; what the job told is in the failure."""

        def explain() -> str:
            events = self.get(f"fine_tuning/jobs/{job}/events?limit=100")["data"]
            logs = [
                f"{path}:\n{path.read_text(errors='replace')[-3000:]}"
                for path in sorted(self.node.settings.data_dir.rglob("*.log"))
            ]
            told = [event["message"] for event in reversed(events)]
            return "\n".join([*told, *logs, self.node.story()])

        wait_for(condition, what, limit_s, explain)
        self.say(what)


@pytest.fixture
def served(tmp_path: Path, checkpoint: Path) -> Iterator[tuple[Served, Path]]:
    """The node, and the file of rows."""
    rows = write_rows(tmp_path, ROWS, distinct=ROWS)
    serve = {"engine": "lmdeploy", "gpus": [GPU], "options": {"backend": "turbomind"}}
    with running_node(
        models=({"model": BASE, **serve},),
        checkpoints={BASE: checkpoint},
        trust_remote_code=True,
        start=False,
        images={"roots": [str(rows.images)]},
        finetune={"gpus": [GPU], "python": TRAINING_PYTHON},
        queue={"drain_s": 5},
    ) as node:
        start(node, LOAD_S)
        yield Served(node, sorted(rows.images.glob("*.jpg"))), rows.file


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_gpu_is_lent_to_a_fine_tune_and_what_it_made_answers(
    served: tuple[Served, Path], method: str
) -> None:
    """Given one GPU for both, then chats are refused meanwhile, batches wait, and both go on."""
    asked, rows = served
    assert asked.chat(BASE).status_code == httpx.codes.OK
    asked.say("the base answers")
    job = asked.post(
        "fine_tuning/jobs",
        {
            "model": BASE,
            "training_file": asked.upload("train.json", rows.read_bytes(), "fine-tune"),
            "suffix": "dishes",
            "seed": 1,
            "hyperparameters": {"n_epochs": 1},
            "vlmq": {"method": method, "images": str(rows.parent / "photos"), "max_compared": 4},
        },
    )["id"]
    asked.wait(lambda: asked.states(BASE) == {"lent"}, "the GPU is lent", ANSWER_S, job)
    refused = asked.chat(BASE)
    assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE, refused.text
    assert int(refused.headers["retry-after"]) > 0
    assert job in refused.text
    batch = asked.batch(16)

    def trained() -> bool:
        record = asked.get(f"fine_tuning/jobs/{job}")
        assert record["status"] not in ("failed", "cancelled"), record
        return bool(record["status"] == "succeeded")

    asked.wait(trained, "the fine-tune has succeeded", TRAIN_S, job)
    record = asked.get(f"fine_tuning/jobs/{job}")
    tuned = record["fine_tuned_model"]
    for event in reversed(asked.get(f"fine_tuning/jobs/{job}/events?limit=100")["data"]):
        if event["type"] == "message":
            asked.say(event["message"])
    compared = asked.http.get(f"files/{record['result_files'][0]}/content").text.splitlines()
    assert len(compared) == 4
    assert all(json.loads(line)["tuned"] is not None for line in compared)
    asked.wait(
        lambda: asked.batches.batch(batch)["status"] == "completed",
        "the batch that waited is completed",
        2 * ANSWER_S,
        job,
    )
    assert asked.batches.batch(batch)["request_counts"]["completed"] == 16

    def answers(model: str) -> bool:
        return asked.chat(model).status_code == httpx.codes.OK

    asked.wait(lambda: answers(tuned), "the tuned model answers", ANSWER_S, job)
    asked.wait(lambda: answers(BASE), "the base answers again", ANSWER_S, job)
