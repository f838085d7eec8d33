"""``vlmq batch export``: a batch's results in the formats that other tools read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import click
import msgspec
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from cli.client import Client, Json
from cli.export.asked import Asked
from cli.export.images import Images
from cli.export.names import Names
from cli.export.parquet import ParquetRows, require_pyarrow
from cli.export.rows import RowStream
from cli.export.sidecars import SidecarWriter
from cli.export.staging import refuse_existing, staged
from cli.export.texts import JsonlWriter, LlavaWriter, OpenAiWriter
from cli.export.webdataset import WebDatasetWriter, shard_name
from cli.export.writing import LeftOut, Report, RowWriter
from cli.options import connect, server_options
from cli.output import err, note

FORMATS = ("jsonl", "parquet", "txt", "webdataset", "llava", "openai")
_WITH_FAILED = {"jsonl", "parquet"}
_WITH_MESSAGES = {"webdataset", "llava", "openai"}
_TERMINAL = {"completed", "failed", "expired", "cancelled"}
_SHOW_EVERY = 256


class Wanted(msgspec.Struct, frozen=True):
    """What was asked for on the command line."""

    batch_id: str
    form: str
    output: Path
    images: Path | None
    prompt: str | None
    embed_images: bool
    shard_items: int | None
    overwrite: bool


@click.command()
@click.argument("batch_id", metavar="ID")
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="Which format.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to write; for txt the folder, usually that of the images.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path, exists=True),
    help="The folder or archive of the images, if not where the server has it.  [webdataset, --embed-images]",
)
@click.option(
    "--errors", type=click.Path(path_type=Path, dir_okay=False), help="List what is left out."
)
@click.option("--prompt", help="The question to write in place of the one asked.  [llava, openai]")
@click.option("--embed-images", is_flag=True, help="Put images into the lines.  [openai]")
@click.option(
    "--shard-items",
    type=click.IntRange(min=1),
    help="Several files of so many images.  [webdataset]",
)
@click.option("--partial", is_flag=True, help="Take what is done of a batch that still runs.")
@click.option("--overwrite", is_flag=True, help="Replace what is there already.")
@server_options
def export(
    batch_id: str,
    form: str,
    output: Path,
    images: Path | None,
    errors: Path | None,
    prompt: str | None,
    shard_items: int | None,
    *,
    embed_images: bool,
    partial: bool,
    overwrite: bool,
    url: str,
    api_key: str | None,
) -> None:
    """Write the results of a batch in another format, on this machine.

    Files appear whole or not at all. jsonl and parquet hold failed lines with their reasons, the
    others leave them out; --errors FILE lists what is left out.
    """
    wanted = Wanted(batch_id, form, output, images, prompt, embed_images, shard_items, overwrite)
    _check(wanted)
    with connect(url, api_key) as client:
        found = client.batch(batch_id)
        if found["status"] not in _TERMINAL and not partial:
            raise click.ClickException(
                f"the batch is not finished ({found['status']}); wait for it with: "
                f"vlmq batch watch {batch_id}; or take what is done with --partial"
            )
        with _report(errors, overwrite=overwrite) as report:
            _run(client, found, wanted, report)


def _check(wanted: Wanted) -> None:
    """Refuse options that would have no effect, and what can be known to fail."""
    reads_images = wanted.form == "webdataset" or wanted.embed_images
    for given, option, is_used in (
        (wanted.prompt is not None, "--prompt", wanted.form in {"llava", "openai"}),
        (wanted.embed_images, "--embed-images", wanted.form == "openai"),
        (wanted.shard_items is not None, "--shard-items", wanted.form == "webdataset"),
        (wanted.images is not None, "--images", reads_images),
    ):
        if given and not is_used:
            raise click.UsageError(f"{option} has no effect here; leave it out")
    if wanted.form == "parquet":
        require_pyarrow()
    if wanted.form != "txt" and not wanted.output.name:
        raise click.UsageError(f"-o must name a file, not {wanted.output}")


def _run(client: Client, found: Json, wanted: Wanted, report: Report) -> None:
    stream = RowStream(client, wanted.batch_id, with_messages=wanted.form in _WITH_MESSAGES)
    written = 0
    with _writer(client, found, wanted, report) as writer, _progress(found) as show:
        for row in stream:
            try:
                if row.error_code is not None and wanted.form not in _WITH_FAILED:
                    raise LeftOut(row.error_code, row.error or "the line failed")
                writer.add(row)
                written += 1
            except LeftOut as error:
                report.leave_out(row, error)
            show()
        if not stream.complete and found["status"] in _TERMINAL:
            raise click.ClickException(
                "the server ended before the batch's last line; export again"
            )
        writer.close()
    _tell(wanted, report, written, writer, complete=stream.complete)


def _tell(
    wanted: Wanted, report: Report, written: int, writer: RowWriter, *, complete: bool
) -> None:
    if isinstance(writer, SidecarWriter):
        fates = writer.fates
        note(
            f"{fates['new']:,} written, {fates['replaced']:,} replaced, {fates['same']:,} there "
            f"already: {wanted.output}"
        )
    else:
        note(f"{written:,} rows: {wanted.output}")
    left = report.left_out
    if left:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common(8))
        note(f"{left.total():,} left out: {reasons}")
    if not complete:
        note("the batch still runs; this is what was done so far")


@contextmanager
def _report(errors: Path | None, *, overwrite: bool) -> Iterator[Report]:
    if errors is None:
        yield Report(None)
        return
    with (
        staged(errors.parent, errors.name, overwrite=overwrite) as staging,
        staging.file(errors.name) as stream,
    ):
        yield Report(stream)


@contextmanager
def _writer(client: Client, found: Json, wanted: Wanted, report: Report) -> Iterator[RowWriter]:
    names = Names(is_set=found.get("input_file_id") is None)
    if wanted.form == "txt":
        sidecars = SidecarWriter(wanted.output, names, report, overwrite=wanted.overwrite)
        try:
            yield sidecars
        finally:
            sidecars.abandon()
        return
    folder, name = wanted.output.parent, wanted.output.name
    if not wanted.overwrite:
        refuse_existing(wanted.output)
    with (
        Images(client, names, wanted.images) as images,
        staged(folder, name, overwrite=wanted.overwrite) as staging,
        ExitStack() as opened,
    ):
        if wanted.form == "webdataset":
            if wanted.shard_items is not None:
                # An earlier export may have made more shards than this one will.
                refuse_existing(folder / shard_name(name, 0))
            yield opened.enter_context(
                WebDatasetWriter(staging, name, images, shard_items=wanted.shard_items)
            )
            return
        stream = opened.enter_context(staging.file(name))
        yield _stream_writer(stream, wanted, names, images)


def _stream_writer(stream: BinaryIO, wanted: Wanted, names: Names, images: Images) -> RowWriter:
    if wanted.form == "jsonl":
        return JsonlWriter(stream)
    if wanted.form == "parquet":
        return ParquetRows(stream)
    asked = Asked(names, prompt=wanted.prompt, embed=images if wanted.embed_images else None)
    return LlavaWriter(stream, asked) if wanted.form == "llava" else OpenAiWriter(stream, asked)


@contextmanager
def _progress(found: Json) -> Iterator[Callable[[], None]]:
    """A counter for a terminal, every few hundred rows."""
    columns = (TextColumn("export"), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("export", total=found["request_counts"]["total"])
        seen = 0

        def show() -> None:
            nonlocal seen
            seen += 1
            if seen % _SHOW_EVERY == 0:
                bar.update(task, completed=seen)

        yield show
