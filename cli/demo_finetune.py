"""The demo's second half: an untrained model learns to caption scenes, through the queue.

The fine-tune is queued over HTTP with the unmodified ``openai`` SDK and run by xtuner and DeepSpeed
on this machine's processor; the tuned model then answers by the same API, beside its base.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import openai
from openai.types.fine_tuning import FineTuningJob

BASE = "tiny-untrained"
SUFFIX = "scenes"
SCENES = 4800
EPOCHS = 10
BATCH = 32
LEARNING_RATE = 1.8e-3
# A faster rise never left the plateau at which every caption is the same.
WARMUP = 0.45
LIMIT_S = 1500
POLL_S = 1.0
TOLD_EVERY_S = 10.0
TERMINAL = ("succeeded", "failed", "cancelled")


def link_untrained(folder: Path, data_dir: Path) -> None:
    """Make a model that has learned nothing, and link it while the server runs."""
    out = folder / "untrained"
    _run("workers.inference.tiny.untrained", str(out))
    arguments = ["models", "link", BASE, str(out)]
    click.echo(f"\n$ vlmq models link {BASE} {out.name}")
    _run("cli.main", *arguments, "--data-dir", str(data_dir))


def write_data(folder: Path) -> tuple[bytes, bytes]:
    """Training rows as OpenAI chat JSONL, and their pictures as a tar archive."""
    lesson = folder / "lesson"
    _run("workers.inference.tiny.lesson", str(lesson), "--count", str(SCENES))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for picture in sorted((lesson / "pictures").iterdir()):
            tar.add(picture, arcname=picture.name)
    return (lesson / "rows.jsonl").read_bytes(), archive.getvalue()


def finetune(sdk: openai.OpenAI, folder: Path) -> FineTuningJob:
    """Queue the fine-tune and follow it to its end."""
    rows, archive = write_data(folder)
    click.echo(f"\nPOST /v1/fine_tuning/jobs: {SCENES} pictures, {EPOCHS} epochs, {BASE}")
    training = sdk.files.create(file=("scenes.jsonl", rows), purpose="fine-tune")
    images = sdk.files.create(file=("scenes.tar", archive), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": EPOCHS, "batch_size": BATCH}
    job = sdk.fine_tuning.jobs.create(
        model=BASE,
        training_file=training.id,
        suffix=SUFFIX,
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={
            "vlmq": {
                "method": "full",
                "learning_rate": LEARNING_RATE,
                "warmup_ratio": WARMUP,
                "lora_targets": ["llm", "vit"],
                "images": images.id,
                "held_out_share": 0.02,
            }
        },
    )
    return _followed(sdk, job)


def _followed(sdk: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    began, told_at, told = time.monotonic(), 0.0, ""
    while job.status not in TERMINAL:
        if time.monotonic() - began > LIMIT_S:
            raise click.ClickException(f"the fine-tune took longer than {LIMIT_S} s: {job}")
        now = time.monotonic() - began
        line = _state(job)
        if line != told and (now - told_at >= TOLD_EVERY_S or "loss" not in line):
            click.echo(f"  {now:4.0f} s  {line}")
            told_at, told = now, line
        time.sleep(POLL_S)
        job = sdk.fine_tuning.jobs.retrieve(job.id)
    seconds = time.monotonic() - began
    if job.status != "succeeded":
        reason = job.error.message if job.error is not None else "no reason was given"
        raise click.ClickException(f"the fine-tune {job.status}: {reason}")
    click.echo(f"  {seconds:4.0f} s  {job.status}: {job.fine_tuned_model}")
    return job


def _state(job: FineTuningJob) -> str:
    extras: dict[str, Any] = (job.model_extra or {}).get("vlmq", {})
    progress = extras.get("progress") or {}
    if job.status != "running" or extras.get("stage") != "train" or not progress.get("step"):
        return f"{job.status}, {extras.get('stage')}"
    loss = progress.get("loss")
    shown = "" if loss is None else f", loss {loss:.3f}"
    return f"step {progress['step']} of {progress['total_steps']}{shown}"


def show_comparison(sdk: openai.OpenAI, job: FineTuningJob, shown: int) -> None:
    """Print what base and tuned model said about rows that were held out."""
    for file_id in job.result_files:
        if not sdk.files.retrieve(file_id).filename.endswith("comparison.jsonl"):
            continue
        lines = sdk.files.content(file_id).text.splitlines()
        click.echo(f"\ncomparison.jsonl: {len(lines)} held-out rows")
        _show_rows([json.loads(line) for line in lines[:shown]])


def _show_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        mark = "right" if row["exact_match"]["tuned"] else f"expected {row['reference']!r}"
        click.echo(f"  before  {_short(row['base'])}")
        click.echo(f"  after   {_short(row['tuned'])}  ({mark})")


def _short(text: str | None, most: int = 60) -> str:
    if text is None:
        return "no answer"
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
