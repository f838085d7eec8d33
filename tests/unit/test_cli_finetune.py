"""The words of ``vlmq finetune`` and ``vlmq compare`` without a server: values, figures, packing."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import click
import pytest

from cli import main
from cli.commands.compare import Answer, show
from cli.commands.finetune import option_values
from cli.finetune_display import BarDisplay, PlainDisplay, duration, figures, state_words
from cli.output import err
from cli.uploading import packed

NOTHING = {
    "step": 0,
    "total_steps": 0,
    "loss": None,
    "learning_rate": None,
    "samples_per_s": None,
    "eta_s": None,
}
TRAINING = {
    "step": 20,
    "total_steps": 100,
    "loss": 1.25,
    "learning_rate": 3e-5,
    "samples_per_s": 6.32,
    "eta_s": 200.0,
}


def job(status: str = "running", **extras: Any) -> dict[str, Any]:
    """As much of a job's object as is shown."""
    plain = {"stage": "train", "wanted": "run", "waiting_for": None, "progress": NOTHING}
    return {"status": status, "vlmq": {**plain, **extras}}


def event(message: str, kind: str = "message", level: str = "info") -> dict[str, Any]:
    """As much of an event's object as is shown."""
    return {"type": kind, "level": level, "message": message}


def test_the_state_says_what_it_waits_for_and_what_was_asked() -> None:
    """The stage of a running job, the wish that is not yet fulfilled, the reason of a wait."""
    assert state_words(job()) == "running: train"
    assert state_words(job(wanted="pause")) == "pausing"
    assert state_words(job(wanted="cancel")) == "cancelling"
    assert state_words(job("paused", wanted="pause")) == "paused"
    assert state_words(job("queued", waiting_for="2 GPUs")) == "queued: waits for 2 GPUs"


def test_figures_are_those_that_are_known() -> None:
    """Nothing before the first step; then loss, rate, speed and the time left while it trains."""
    assert figures(job()) == ""
    training = job(progress=TRAINING)
    assert figures(training) == "loss 1.2500  lr 3.00e-05  6.3 samples/s  3m 20s left"
    assert figures(job("paused", progress=TRAINING)) == "loss 1.2500  lr 3.00e-05"
    assert figures(job(stage="convert", progress=TRAINING)) == "loss 1.2500  lr 3.00e-05"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0s"), (59.4, "59s"), (60, "1m 00s"), (3599.6, "1h 00m"), (7500, "2h 05m")],
)
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    """Seconds, minutes, hours."""
    assert duration(seconds) == said


def test_a_log_gets_a_line_for_what_changed_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Given the same state again, then nothing is written; messages are, metrics are not."""
    display = PlainDisplay()
    display.show(job("queued"), [event("created")])
    display.show(job("queued"), [])
    display.show(job(progress=TRAINING), [event("step 20", "metrics")])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  created",
        "queued",
        "running: train 20/100, loss 1.2500  lr 3.00e-05  6.3 samples/s  3m 20s left",
    ]


def test_a_terminal_gets_a_bar_of_steps() -> None:
    """The bar has the steps as its total and says what the job is at."""
    from rich.progress import Progress

    bar = Progress(console=err)
    BarDisplay(bar).show(job(progress=TRAINING), [])
    [task] = bar.tasks
    assert (task.description, task.completed, task.total) == ("running: train", 20, 100)
    assert "loss 1.2500" in task.fields["figures"]


def test_other_options_are_json_or_text() -> None:
    """Numbers, lists and switches as JSON; a word stays a word."""
    given = ("lora_rank=64", 'lora_targets=["llm","vit"]', "deepspeed=zero3", "images=/a=b")
    assert option_values(given) == {
        "lora_rank": 64,
        "lora_targets": ["llm", "vit"],
        "deepspeed": "zero3",
        "images": "/a=b",
    }
    with pytest.raises(click.BadParameter, match="lora_rank"):
        option_values(("lora_rank",))


def test_a_folder_is_packed_by_the_paths_in_it(tmp_path: Path) -> None:
    """Files at their places below the folder, links as what they lead to, nothing hidden."""
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere.jpg"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".cache").mkdir()
    elsewhere.write_bytes(b"there")
    (folder / "b.jpg").write_bytes(b"b")
    (folder / "deep" / "er" / "a.jpg").write_bytes(b"a")
    (folder / ".cache" / "x.jpg").write_bytes(b"x")
    (folder / ".hidden").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(elsewhere)
    (folder / "gone.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe")
    with packed(folder) as archive, tarfile.open(archive) as tar:
        assert archive.name == "pictures.tar"
        found = {member.name: tar.extractfile(member) for member in tar if member.isreg()}
        assert {name: stream.read() for name, stream in found.items() if stream} == {
            "b.jpg": b"b",
            "link.jpg": b"there",
            "deep/er/a.jpg": b"a",
        }
        assert len(tar.getmembers()) == 3
    assert not archive.exists()


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    """There would be nothing to learn from."""
    with pytest.raises(click.ClickException, match="holds no files"), packed(tmp_path):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", "create", "--model", "m"),
        ("finetune", "create", "--model", "m", "--data", "/nowhere.jsonl"),
        ("finetune", "create", "--model", "m", "--data", "file-a", "--images", "/nowhere"),
        ("finetune", "create", "--model", "m", "--data", "file-a", "--method", "dora"),
        ("compare", __file__, "--models", "one"),
        ("compare", "/nowhere.jpg", "--models", "one,two"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sent: no server answers here, and none is asked."""
    assert main.run([*arguments, "--url", "http://127.0.0.1:9"]) == 2
    assert "Error: " in capsys.readouterr().err


def test_a_folder_here_and_one_there_are_not_given_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures come from one place."""
    both = ("--images", str(tmp_path), "--server-images", "/data")
    assert main.run(["finetune", "create", "--model", "m", "--data", "file-a", *both]) == 2
    assert "not both" in capsys.readouterr().err


def test_answers_stand_side_by_side_where_there_is_room(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wide: one line has both answers. Narrow: one below the other."""
    answers = [Answer("base", "a dog"), Answer("tuned", "", error="it is away")]
    show(answers, 100)
    wide = capsys.readouterr().out
    assert any("a dog" in line and "(no answer)" in line for line in wide.splitlines())
    show(answers, 30)
    narrow = capsys.readouterr().out.splitlines()
    assert narrow == ["base", "  a dog", "tuned", "  (no answer)"]


def test_a_model_does_not_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters of an answer are shown as such; lines and tabs stay."""
    show([Answer("base", "a\x1b]0;title\x07\nb\tc\x9b31m"), Answer("tuned", "d")], 20)
    said = capsys.readouterr().out
    assert "a\ufffd]0;title\ufffd" in said
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
