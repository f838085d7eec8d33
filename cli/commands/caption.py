"""``vlmq caption``: caption a folder, an archive, a list or a table of images."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from cli.client import Client, Json, ServerTrouble
from cli.commands.batch import follow_to_end, stay_or_name
from cli.options import connect, json_option, pairs, server_options
from cli.output import note
from cli.preflight import SAMPLE_IMAGES, show_preflight
from cli.uploading import packed, upload

PURPOSE = "vision"
_UPLOAD_ID = re.compile(r"file-[A-Za-z0-9]+")
_TYPES = ("folder", "glob", "list", "tar", "zip", "table", "image")


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--model", required=True, help="The model to ask.")
@click.option("--prompt", help="What to ask about each image, taken as it is.")
@click.option("--template", help="The same with {column} or {sidecar} for each image's own text.")
@click.option("--system", help="A system message.")
@click.option("--type", "kind", type=click.Choice(_TYPES), help="What PATH is, if not by itself.")
@click.option("--image-column", help="The column of a table or list with the images or paths.")
@click.option("--name-column", help="The column with their names.")
@click.option("--detail", type=click.Choice(["auto", "low", "high"]), help="Tiles per image.")
@click.option("--max-tokens", type=int, help="Most tokens of a caption.")
@click.option("--min-new-tokens", type=int, help="Least tokens of a caption.")
@click.option("--temperature", type=float, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, help="Take tokens of so much likelihood together.")
@click.option("--top-k", type=int, help="Take one of so many tokens.")
@click.option("--repetition-penalty", type=float, help="Above 1: repeat less.")
@click.option("--stop", multiple=True, help="End a caption before this text; repeatable.")
@click.option("--seed", type=int, help="The same seed gives the same captions.")
@click.option("--sync", "syncs", is_flag=True, help="Ask only about what is new or changed since.")
@click.option("--set", "set_name", help="The same for a set by its name, wherever its images are.")
@click.option("--rehash", is_flag=True, help="With --sync: read files that look as before, too.")
@click.option("--only-new", is_flag=True, help="With --sync: no lines for what has its caption.")
@click.option("--window", help="How long it may take, e.g. 7d.  [default: 24h]")
@click.option("--metadata", multiple=True, metavar="NAME=VALUE", help="Kept with the job.")
@click.option("--upload", "sends", is_flag=True,
              help="Send PATH, which is here, instead of naming a path of the server.")  # fmt: skip
@click.option(
    "--gate",
    is_flag=True,
    help="Ask again for captions that are empty, cut off, refusals or loops.",
)
@click.option("--language", help="The same for captions not written as this is, e.g. zh.")
@click.option(
    "--resamples", type=click.IntRange(0, 8), help="How often to ask again.  [default: 2]"
)
@click.option(
    "--dry-run",
    "tries",
    is_flag=True,
    help="Caption 64 images of the set and say what all would take.",
)
@click.option("--watch", "follow", is_flag=True, help="Stay and show the progress.")
@json_option
@server_options
def caption(
    paths: tuple[str, ...],
    prompt: str | None,
    template: str | None,
    metadata: tuple[str, ...],
    window: str | None,
    stop: tuple[str, ...],
    kind: str | None,
    image_column: str | None,
    name_column: str | None,
    *,
    gate: bool,
    language: str | None,
    resamples: int | None,
    tries: bool,
    set_name: str | None,
    syncs: bool,
    rehash: bool,
    only_new: bool,
    sends: bool,
    follow: bool,
    as_json: bool,
    url: str,
    api_key: str | None,
    **others: Any,
) -> None:
    """Caption every image in PATHs: folders, patterns, images, tars, zips, Parquet or Arrow files, lists.

    Paths are the server's, below its images.roots; on the same machine that is all there is to know.
    With --upload, archives, files and folders from here are sent first. A PATH may be an upload's id.
    """
    if (prompt is None) == (template is None):
        raise click.UsageError("give --prompt, or --template with {column} in it")
    sync = {"name": set_name, "rehash": rehash or None, "only_new": only_new or None}
    wanted = {name: value for name, value in sync.items() if value is not None}
    if wanted and not (syncs or set_name):
        raise click.UsageError("--rehash and --only-new need --sync or --set NAME")
    columns = {"type": kind, "image_column": image_column, "name_column": name_column}
    with connect(url, api_key) as client:
        places = [_place(client, path, sends=sends) for path in paths]
        given = {name: value for name, value in columns.items() if value is not None}
        body: Json = {
            "images": [{**place, **given} for place in places],
            "prompt": prompt,
            "template": template,
            "stop": list(stop) or None,
            "completion_window": window,
            "metadata": pairs(metadata) or None,
            "quality": _quality(language, resamples, is_on=gate),
            "sample": {"images": SAMPLE_IMAGES} if tries else None,
            "sync": wanted if syncs or set_name else None,
            **others,
        }
        created = _created(client, {key: value for key, value in body.items() if value is not None})
        note(f"batch {created['id']} started")
        if tries:
            show_preflight(client, follow_to_end(client, created["id"]), as_json=as_json)
            return
        stay_or_name(client, created, follow=follow, as_json=as_json)


def _quality(language: str | None, resamples: int | None, *, is_on: bool) -> Json | None:
    """The quality gate, if an option asks for it."""
    asked = {"language": language, "resamples": resamples}
    given = {name: value for name, value in asked.items() if value is not None}
    return given if given or is_on else None


def _place(client: Client, path: str, *, sends: bool) -> Json:
    """Where a PATH is, as the server is told."""
    if _UPLOAD_ID.fullmatch(path):
        return {"file": path}
    if not sends:
        # Not resolved: the server does that, and what is a link here may be none there.
        return {"path": str(Path(path).absolute())}
    here = Path(path)
    if not here.exists():
        raise click.ClickException(f"there is no {path}; --upload sends what is here")
    with packed(here) if here.is_dir() else nullcontext(here) as file:
        return {"file": upload(client, file, PURPOSE)["id"]}


def _created(client: Client, body: Json) -> Json:
    try:
        return client.create_captions(body)
    except ServerTrouble as error:
        if "images.roots" in error.message:
            note("to send files from here instead, add --upload")
        raise
