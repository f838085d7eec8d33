"""``vlmq finetune`` and ``vlmq compare`` as processes, against a real API server.

The test is the worker: it takes jobs through their states while the command watches.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from shared.finetune_store import NewEvent
from shared.finetunes import FinetuneError, FinetuneState, Progress
from shared.process import free_port
from shared.stores import Stores
from tests.checkpoints import TUNABLE, write_checkpoint
from tests.claimed_finetunes import training
from tests.integration.api_server import ApiServer, running_api
from tests.running_node import RunningNode, wait_for

LLAVA = '[{"image": "a.jpg", "conversations": []}]'
HALF = Progress(5, 10, 0.5, loss=1.25, learning_rate=3e-5, samples_per_s=6.3, eta_s=90.0)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    """A server that comes back under the same address, with a model that can be tuned."""
    with running_api(port=free_port()) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def base(sdk: openai.OpenAI, stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The model ``base``, known to the server."""
    folder = tmp_path_factory.mktemp("checkpoints") / "base"
    stores.models.link("base", write_checkpoint(folder, TUNABLE))

    def is_known() -> bool:
        with contextlib.suppress(openai.NotFoundError):
            return sdk.models.retrieve("base").id == "base"
        return False

    wait_for(is_known, "base to be known", 20)


class Command:
    """A running ``vlmq``; what it says on standard error is read as it comes."""

    def __init__(self, url: str, *arguments: str, terminal: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
            text=True,
            env={**os.environ, "VLMQ_URL": url, "COLUMNS": "160", "TERM": "xterm"},
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        if terminal is None:
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def has_said(self, words: str) -> None:
        """Wait until it has."""
        wait_for(lambda: words in self.said, f"'{words}'", 30, lambda: self.said)

    def end(self) -> tuple[int, str]:
        """Its exit status and standard output."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        status = self.process.wait(timeout=60)
        if self._reader.is_alive():
            self._reader.join(timeout=30)
        return status, out


def vlmq(api: ApiServer, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run it to its end; returns standard output and standard error."""
    command = Command(api.base_url, *arguments)
    found, out = command.end()
    assert found == status, (out, command.said)
    return out, command.said


def create(api: ApiServer, folder: Path, *more: str) -> str:
    """Queue a fine-tune of a small file; returns its id."""
    (folder / "rows.json").write_text(LLAVA)
    data = ("--data", str(folder / "rows.json"))
    out, _ = vlmq(api, "finetune", "create", "--model", "base", *data, *more)
    return out.strip()


def test_data_and_pictures_are_uploaded_and_named(
    api: ApiServer, stores: Stores, tmp_path: Path
) -> None:
    """Given files and a folder, then they go up first and the job has all that was said."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(b"not yet looked at")
    words = ["--images", str(pictures), "--suffix", "food", "--epochs", "3", "--batch-size", "16"]
    words += ["--learning-rate", "1e-4", "--method", "lora", "--gpus", "2", "--seed", "5"]
    words += ["--set", "lora_rank=8", "--set", 'lora_targets=["llm","vit"]', "--metadata", "a=b"]
    words += ["--validation", str(tmp_path / "rows.json")]
    job = stores.finetunes.get("local", create(api, tmp_path, *words))
    assert (job.suffix, job.seed, job.metadata) == ("food", 5, {"a": "b"})
    recipe = job.recipe
    assert (recipe.n_epochs, recipe.batch_size, recipe.learning_rate) == (3, 16, 1e-4)
    assert (recipe.gpus, recipe.lora_rank, recipe.lora_targets) == (2, 8, ("llm", "vit"))
    data = stores.files.content_path("local", job.data.training_file)
    assert data.read_text() == LLAVA
    assert job.data.validation_file not in (None, job.data.training_file)
    assert job.data.images is not None
    with tarfile.open(stores.files.content_path("local", job.data.images)) as tar:
        assert tar.getnames() == ["a.jpg"]


def test_what_is_there_already_is_named_by_its_id(
    api: ApiServer, stores: Stores, tmp_path: Path
) -> None:
    """An upload's id stands for the file."""
    first = stores.finetunes.get("local", create(api, tmp_path))
    out, err = vlmq(
        api, "finetune", "create", "--model", "base", "--data", first.data.training_file, "--json"
    )
    assert json.loads(out)["training_file"] == first.data.training_file
    assert "uploaded" not in err


def test_a_refusal_is_said_in_the_servers_words(api: ApiServer, tmp_path: Path) -> None:
    """Exit status 1, and the option that is wrong."""
    (tmp_path / "rows.json").write_text(LLAVA)
    words = ("--data", str(tmp_path / "rows.json"), "--set", "lora_rnk=8")
    _, err = vlmq(api, "finetune", "create", "--model", "base", *words, status=1)
    assert "vlmq.lora_rnk" in err
    assert "Traceback" not in err


def test_a_job_is_listed_paused_resumed_and_cancelled(api: ApiServer, tmp_path: Path) -> None:
    """Each command says how it stands afterwards."""
    job_id = create(api, tmp_path)
    _, err = vlmq(api, "finetune", "pause", job_id)
    assert "is paused" in err
    out, _ = vlmq(api, "finetune", "resume", job_id, "--json")
    assert json.loads(out)["status"] == "validating_files"
    out, _ = vlmq(api, "finetune", "list")
    assert job_id in out
    vlmq(api, "finetune", "cancel", job_id)
    _, err = vlmq(api, "finetune", "resume", job_id, status=1)
    assert "cancelled and cannot be resumed" in err
    _, err = vlmq(api, "finetune", "watch", job_id, status=1)
    assert "was cancelled" in err


def test_a_watch_shows_steps_and_outlives_the_server(
    api: ApiServer, stores: Stores, tmp_path: Path
) -> None:
    """Given a server that restarts under it, then it goes on to the end and exits with 0."""
    job_id = create(api, tmp_path)
    command = Command(api.base_url, "finetune", "watch", job_id, "--json")
    command.has_said("validating_files")
    with training(stores, job_id) as lease:
        stores.finetunes.note(lease, progress=HALF)
        command.has_said("running: train 5/10, loss 1.2500")
        api.stop()
        command.has_said("trying again until it answers")
        stores.finetunes.add_events(
            lease,
            [
                NewEvent("The learning rate was warmed up"),
                NewEvent("step 6", type="metrics", data={"step": 6, "train_loss": 1.0}),
            ],
        )
        api.start()
        command.has_said("The learning rate was warmed up")
        stores.finetunes.move(
            lease, FinetuneState.SUCCEEDED, message="It is done", fine_tuned_model="ft:base::1"
        )
    status, out = command.end()
    assert status == 0
    assert json.loads(out)["fine_tuned_model"] == "ft:base::1"
    assert "vlmq compare PICTURE --models base,ft:base::1" in command.said
    assert command.said.count("The learning rate was warmed up") == 1
    assert "step 6" not in command.said


def test_a_failed_job_exits_with_1_and_its_reason(
    api: ApiServer, stores: Stores, tmp_path: Path
) -> None:
    """The error's message and code."""
    job_id = create(api, tmp_path)
    with training(stores, job_id) as lease:
        error = FinetuneError("training_diverged", "the loss is NaN at step 7")
        stores.finetunes.move(lease, FinetuneState.FAILED, message="It failed", error=error)
    _, err = vlmq(api, "finetune", "watch", job_id, status=1)
    assert "the loss is NaN at step 7 (training_diverged)" in err


def test_a_terminal_gets_a_bar(api: ApiServer, stores: Stores, tmp_path: Path) -> None:
    """Steps, loss, speed and the time left stand beside it."""
    job_id = create(api, tmp_path)
    main_end, terminal = os.openpty()
    with training(stores, job_id) as lease:
        stores.finetunes.note(lease, progress=HALF)
        command = Command(api.base_url, "finetune", "watch", job_id, terminal=terminal)
        os.close(terminal)
        said = b""
        while b"1m 30s left" not in said:
            said += os.read(main_end, 65536)
        stores.finetunes.move(lease, FinetuneState.SUCCEEDED, message="It is done")
    # The rest is read, so that nothing waits for room in the terminal; its end shows as an error.
    with contextlib.suppress(OSError):
        while piece := os.read(main_end, 65536):
            said += piece
    os.close(main_end)
    assert command.process.wait(timeout=60) == 0
    for words in (b"running: train", b"5/10", b"loss 1.2500", b"6.3 samples/s", b"It is done"):
        assert words in said


def test_answers_are_compared_side_by_side(node: RunningNode, tmp_path: Path) -> None:
    """Each model is asked the same about the picture; one that is not there fails the command."""
    from PIL import Image

    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    words = ("compare", str(picture), "--prompt", "what is it")
    command = Command(node.base_url, *words, "--models", "echo,echo")
    status, out = command.end()
    assert status == 0
    assert any(line.count("what is it") == 2 for line in out.splitlines()), out
    command = Command(node.base_url, *words, "--models", "echo,nobody", "--json")
    status, out = command.end()
    assert status == 1
    first, second = json.loads(out)
    assert "what is it" in first["text"]
    assert (second["text"], "nobody" in second["error"]) == ("", True)
    assert "no answer from nobody" in command.said
