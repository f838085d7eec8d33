"""``vlmq finetune``: queue fine-tunes, watch them, stop them and let them go on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from cli.client import Client, Json
from cli.finetune_display import display, state_words, steps
from cli.following import patiently
from cli.options import connect, json_option, page_options, pairs, server_options
from cli.output import note, note_older, print_json, print_table, when
from cli.uploading import packed, upload

TERMINAL = {"succeeded", "failed", "cancelled"}
POLL_S = 1.0
EVENTS_AT_ONCE = 100
PURPOSE = "fine-tune"
_ID = re.compile(r"(file-|batch_)[A-Za-z0-9]+")


@click.group()
def finetune() -> None:
    """Tune a model on your own pictures and texts."""


@finetune.command()
@click.option("--model", required=True, help="The base model.")
@click.option("--data", required=True, metavar="FILE|ID",
              help="Rows to learn from (.jsonl, .json), an upload's id or a finished batch's.")  # fmt: skip
@click.option("--validation", metavar="FILE|ID", help="Rows to hold out; else some of the data.")
@click.option("--images", metavar="PATH|ID",
              help="Their pictures: a folder or archive here (uploaded), or an upload's id.")  # fmt: skip
@click.option("--server-images", metavar="PATH",
              help="Their pictures: a folder on the server, below its images.roots.")  # fmt: skip
@click.option("--suffix", help="A word of yours in the tuned model's name.")
@click.option("--method", type=click.Choice(["lora", "qlora", "full"]), help="[default: lora]")
@click.option("--epochs", type=int, help="How often every row is seen.")
@click.option("--batch-size", type=int, help="Rows of one step, over all GPUs.")
@click.option("--learning-rate", type=float, help="The highest learning rate.")
@click.option("--gpus", type=int, help="How many GPUs to train on.  [default: 1]")
@click.option("--seed", type=int, help="Makes the run repeatable.")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE",
              help="Any other option under 'vlmq', e.g. lora_rank=64; repeatable.")  # fmt: skip
@click.option("--training-config", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="A whole xtuner configuration; needs the right to run code.")  # fmt: skip
@click.option("--metadata", multiple=True, metavar="NAME=VALUE", help="Kept with the job.")
@click.option("--watch", "follow", is_flag=True, help="Stay and show the progress.")
@json_option
@server_options
def create(
    model: str,
    data: str,
    validation: str | None,
    images: str | None,
    server_images: str | None,
    suffix: str | None,
    method: str | None,
    epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    gpus: int | None,
    seed: int | None,
    others: tuple[str, ...],
    training_config: Path | None,
    metadata: tuple[str, ...],
    *,
    follow: bool,
    as_json: bool,
    url: str,
    api_key: str | None,
) -> None:
    """Queue a fine-tune; files that are named here are uploaded first."""
    if images is not None and server_images is not None:
        raise click.UsageError("give --images or --server-images, not both")
    options = {
        **option_values(others),
        **_given(method=method, learning_rate=learning_rate, gpus=gpus, images=server_images),
    }
    hyperparameters = _given(n_epochs=epochs, batch_size=batch_size)
    body = _given(model=model, suffix=suffix, seed=seed, metadata=pairs(metadata) or None)
    for place in (data, validation, images):
        _require_readable(place)
    with connect(url, api_key) as client:
        body["training_file"] = _file_id(client, data)
        if validation is not None:
            body["validation_file"] = _file_id(client, validation)
        if images is not None:
            options["images"] = _images_id(client, images)
        if training_config is not None:
            options["config_file"] = upload(client, training_config, PURPOSE)["id"]
        if hyperparameters:
            supervised = {"hyperparameters": hyperparameters}
            body["method"] = {"type": "supervised", "supervised": supervised}
        if options:
            body["vlmq"] = options
        created = client.create_finetune(body)
        note(f"fine-tune {created['id']} is queued")
        if follow:
            _finish(_watch(client, created["id"]), as_json=as_json)
        elif as_json:
            print_json(created)
        else:
            click.echo(created["id"])


@finetune.command("list")
@page_options("fine-tune")
@json_option
@server_options
def list_finetunes(
    limit: int, after: str | None, *, as_json: bool, url: str, api_key: str | None
) -> None:
    """List fine-tunes, newest first."""
    with connect(url, api_key) as client:
        page = client.finetunes(limit, after)
    if as_json:
        print_json(page)
        return
    rows = [
        (
            job["id"],
            state_words(job),
            steps(job["vlmq"]["progress"]),
            job["fine_tuned_model"] or f"(of {job['model']})",
            when(job["created_at"]),
        )
        for job in page["data"]
    ]
    columns = ("ID", "STATUS", "STEPS", "MODEL", "CREATED")
    print_table(columns, rows, "there are no fine-tunes yet")
    note_older(page, "vlmq finetune list")


@finetune.command()
@click.argument("job_id", metavar="ID")
@json_option
@server_options
def watch(job_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Show the progress of a fine-tune until it ends. Ctrl-C leaves it running."""
    with connect(url, api_key) as client:
        _finish(_watch(client, job_id), as_json=as_json)


@finetune.command()
@click.argument("job_id", metavar="ID")
@json_option
@server_options
def cancel(job_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Stop a fine-tune for good; its checkpoints are kept."""
    _ask(job_id, "cancel", as_json=as_json, url=url, api_key=api_key)


@finetune.command()
@click.argument("job_id", metavar="ID")
@json_option
@server_options
def pause(job_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Stop a fine-tune for a while; its GPUs are free meanwhile."""
    _ask(job_id, "pause", as_json=as_json, url=url, api_key=api_key)


@finetune.command()
@click.argument("job_id", metavar="ID")
@json_option
@server_options
def resume(job_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Let a paused fine-tune go on from its last checkpoint."""
    _ask(job_id, "resume", as_json=as_json, url=url, api_key=api_key)


def option_values(values: Sequence[str]) -> Json:
    """``("lora_rank=64", …)``: values are JSON, or text where they are not.

    Raises: click.BadParameter.
    """
    return {name: _value(text) for name, text in pairs(values).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _given(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


# --- what goes up ---


def _require_readable(place: str | None) -> None:
    """Say so before anything is uploaded if something is not there."""
    if place is not None and not _ID.fullmatch(place) and not Path(place).exists():
        raise click.BadParameter(f"there is no '{place}'; it is no id of an upload, either")


def _file_id(client: Client, place: str) -> str:
    if _ID.fullmatch(place):
        return place
    return str(upload(client, Path(place), PURPOSE)["id"])


def _images_id(client: Client, place: str) -> str:
    folder = Path(place)
    if _ID.fullmatch(place) or not folder.is_dir():
        return _file_id(client, place)
    with packed(folder) as archive:
        return str(upload(client, archive, PURPOSE)["id"])


# --- asking and watching ---


def _ask(
    job_id: str,
    wanted: Literal["cancel", "pause", "resume"],
    *,
    as_json: bool,
    url: str,
    api_key: str | None,
) -> None:
    with connect(url, api_key) as client:
        job = client.ask_finetune(job_id, wanted)
    if as_json:
        print_json(job)
        return
    is_busy = wanted != "resume" and job["status"] == "running"
    note(f"fine-tune {job_id} is {state_words(job)}" + (", with a checkpoint" if is_busy else ""))


def _watch(client: Client, job_id: str) -> Json:
    """Poll until the job has ended, through restarts of the server; returns it as it ended."""
    news = News(client, job_id)
    try:
        with display() as show:
            while True:
                job = patiently(lambda: client.finetune(job_id))
                # After the job: once it has ended, its last event is among these.
                show(job, patiently(news.read))
                if job["status"] in TERMINAL:
                    return job
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        note(
            f"\nthe fine-tune goes on without you. Watch again: vlmq finetune watch {job_id}\n"
            f"                                  Stop it:     vlmq finetune pause|cancel {job_id}"
        )
        raise


class News:
    """The events of a job that were not read yet."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self._job_id = job_id
        self._last: str | None = None

    def read(self) -> list[Json]:
        """Events since the last time, oldest first; the first time the last few of them."""
        found: list[Json] = []
        after: str | None = None
        while True:
            page = self._client.finetune_events(self._job_id, EVENTS_AT_ONCE, after)
            for event in page["data"]:
                if event["id"] == self._last:
                    return self._kept(found)
                found.append(event)
            if self._last is None or not page["has_more"]:
                return self._kept(found)
            after = page["data"][-1]["id"]

    def _kept(self, newest_first: list[Json]) -> list[Json]:
        if newest_first:
            self._last = newest_first[0]["id"]
        return newest_first[::-1]


def _finish(job: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    if job["status"] == "failed":
        error: Mapping[str, Any] = job["error"] or {}
        raise click.ClickException(
            f"the fine-tune failed: {error.get('message')} ({error.get('code')})"
        )
    if job["status"] == "cancelled":
        raise click.ClickException("the fine-tune was cancelled; its checkpoints are kept")
    name = job["fine_tuned_model"]
    note(f"done: {name}. Beside its base: vlmq compare PICTURE --models {job['model']},{name}")
    if job["result_files"]:
        note(f"results, at /v1/files/ID/content: {', '.join(job['result_files'])}")
