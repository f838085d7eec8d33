"""``vlmq batch``: submit, watch, read, list and cancel batches."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)

from cli import batch_words as words
from cli.client import Client, Json
from cli.commands.export import export
from cli.following import follow_results, patiently
from cli.options import connect, json_option, page_options, pairs, server_options
from cli.output import err, note, note_older, print_json, print_table, when
from cli.uploading import upload

TERMINAL = {"completed", "failed", "expired", "cancelled"}
POLL_S = 0.5
PLAIN_LINE_S = 10.0
"""Without a terminal, progress is one line this often."""


@click.group()
def batch() -> None:
    """Run many requests from a JSONL file."""


batch.add_command(export)


@batch.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--watch", "follow", is_flag=True, help="Stay and show the progress.")
@click.option("--metadata", multiple=True, metavar="NAME=VALUE", help="Kept with the batch.")
@json_option
@server_options
def submit(
    file: Path,
    metadata: tuple[str, ...],
    *,
    follow: bool,
    as_json: bool,
    url: str,
    api_key: str | None,
) -> None:
    """Upload FILE (one request per line) and run it."""
    labels = pairs(metadata)
    with connect(url, api_key) as client:
        uploaded = upload(client, file, "batch")
        created = client.create_batch(uploaded["id"], labels)
        note(f"batch {created['id']} started")
        stay_or_name(client, created, follow=follow, as_json=as_json)


@batch.command()
@click.argument("batch_id", metavar="ID")
@json_option
@server_options
def watch(batch_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Show the progress of a batch until it ends. Ctrl-C leaves the batch running."""
    with connect(url, api_key) as client:
        _finish(client, follow_to_end(client, batch_id), as_json=as_json)


@batch.command()
@click.argument("batch_id", metavar="ID")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Into FILE.")
@click.option("--errors", type=click.Path(path_type=Path, dir_okay=False), help="Failed ones.")
@click.option("--follow", is_flag=True, help="Write lines as they are done, until the batch ends.")
@click.option(
    "--after",
    type=click.IntRange(min=0),
    help="With --follow: go on after this line of the input; files are appended to.",
)
@server_options
def results(
    batch_id: str,
    output: Path | None,
    errors: Path | None,
    *,
    follow: bool,
    after: int | None,
    url: str,
    api_key: str | None,
) -> None:
    """Write the answers of a finished batch, one JSON object per line.

    With --follow also of a running one, in the order of its input; failed lines are among them
    unless --errors FILE takes them.
    """
    if after is not None and not follow:
        raise click.UsageError("--after goes with --follow")
    with connect(url, api_key) as client:
        if follow:
            follow_results(client, batch_id, output=output, errors=errors, after=after)
            found = patiently(lambda: client.batch(batch_id))
            _explain_problems(found)
            note(f"the batch is {found['status']}: {counts(found)}")
            if found["status"] != "completed":
                raise SystemExit(1)
            return
        found = client.batch(batch_id)
        if found["status"] not in TERMINAL:
            raise click.ClickException(
                f"the batch is not finished ({found['status']}); wait for it with: "
                f"vlmq batch watch {batch_id}; or take what is done with --follow"
            )
        _fetch(client, found.get("output_file_id"), output or Path("-"), "answers")
        if errors is not None:
            _fetch(client, found.get("error_file_id"), errors, "failed requests")
        elif found.get("error_file_id"):
            failed = found["request_counts"]["failed"]
            note(f"{failed} request(s) failed; --errors FILE writes why")
    _explain_problems(found)


@batch.command()
@click.argument("batch_id", metavar="ID")
@click.option("--watch", "follow", is_flag=True, help="Stay and show the progress.")
@json_option
@server_options
def retry(batch_id: str, *, follow: bool, as_json: bool, url: str, api_key: str | None) -> None:
    """Make a new batch of the failed lines of one that has ended."""
    with connect(url, api_key) as client:
        created = client.retry_batch(batch_id)
        note(f"batch {created['id']} started; it retries {batch_id}")
        stay_or_name(client, created, follow=follow, as_json=as_json)


@batch.command()
@click.argument("batch_id", metavar="ID")
@json_option
@server_options
def review(batch_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Show the captions that did not pass a job's quality gate, with the reasons.

    With --json the lines of the output, one JSON object per line.
    """
    with connect(url, api_key) as client:
        found = 0
        for line in _reviewed(client, batch_id):
            found += 1
            if as_json:
                click.echo(line.rstrip(b"\n"))
                continue
            row = json.loads(line)
            reasons = ", ".join(row["vlmq"]["quality"]["reasons"])
            text = row["response"]["body"]["choices"][0]["message"]["content"]
            click.echo(f"{row['custom_id']}: {reasons}: {words.short(text)}")
        if not found:
            note("there is no caption to review")


def _reviewed(client: Client, batch_id: str) -> Iterator[bytes]:
    """The lines to be reviewed among those that are done."""
    after = 0
    while True:
        with client.review_lines(batch_id, after) as lines:
            yield from lines
            if lines.complete or lines.next_after == after:
                return
            after = lines.next_after


@batch.command("list")
@page_options("batch")
@json_option
@server_options
def list_batches(
    limit: int, after: str | None, *, as_json: bool, url: str, api_key: str | None
) -> None:
    """List batches, newest first."""
    with connect(url, api_key) as client:
        page = client.batches(limit, after)
    if as_json:
        print_json(page)
        return
    rows = [(b["id"], b["status"], counts(b), b.get("model") or "-", when(b["created_at"]))
            for b in page["data"]]  # fmt: skip
    print_table(("ID", "STATUS", "DONE", "MODEL", "CREATED"), rows, "there are no batches yet")
    note_older(page, "vlmq batch list")


@batch.command()
@click.argument("batch_id", metavar="ID")
@json_option
@server_options
def cancel(batch_id: str, *, as_json: bool, url: str, api_key: str | None) -> None:
    """Stop a batch; what is done by then is kept."""
    with connect(url, api_key) as client:
        stopped = client.cancel_batch(batch_id)
    if as_json:
        print_json(stopped)
    else:
        note(f"batch {batch_id} is {stopped['status']}; {counts(stopped)} done so far")


def counts(found: Json) -> str:
    """How far a batch is, e.g. ``1200/2000`` or ``1200/2000 (3 failed)``.

    ``1200/2000+`` while more images are being listed.
    """
    numbers = found["request_counts"]
    more = "+" if is_listing(found) else ""
    done = f"{numbers['completed']}/{numbers['total']}{more}"
    return f"{done} ({numbers['failed']} failed)" if numbers["failed"] else done


def is_listing(found: Json) -> bool:
    """Whether more images of a caption job are to come."""
    listing = (found.get("vlmq") or {}).get("listing")
    return listing is not None and not listing["complete"] and found["status"] not in TERMINAL


# --- watching ---


def follow_to_end(client: Client, batch_id: str) -> Json:
    """Poll until the batch has ended, through restarts of the server; returns it as it ended."""
    try:
        with _display() as show:
            while True:
                found = patiently(lambda: client.batch(batch_id))
                show(found)
                if found["status"] in TERMINAL:
                    return found
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        note(
            f"\nthe batch goes on without you. Watch again: vlmq batch watch {batch_id}\n"
            f"                              Stop it:     vlmq batch cancel {batch_id}"
        )
        raise


@contextlib.contextmanager
def _display() -> Iterator[Callable[[Json], None]]:
    if not err.is_terminal:
        yield PlainProgress().show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=err) as bar:
        yield BarProgress(bar).show


class BarProgress:
    """A progress bar for a terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("waiting", total=None, failed="", pace="")

    def show(self, found: Json) -> None:
        """Bring the bar up to date."""
        numbers = found["request_counts"]
        done = numbers["completed"] + numbers["failed"]
        self._bar.update(
            self._task,
            description=found["status"] + (", listing" if is_listing(found) else ""),
            total=None if is_listing(found) else numbers["total"] or None,
            completed=done,
            failed=f"{numbers['failed']} failed" if numbers["failed"] else "",
            pace=words.pace(found),
        )


class PlainProgress:
    """Lines for a log: at every change of state, and every PLAIN_LINE_S."""

    def __init__(self) -> None:
        self._status = ""
        self._next_at = 0.0

    def show(self, found: Json) -> None:
        """Write a line if one is due."""
        now = time.monotonic()
        if found["status"] == self._status and now < self._next_at:
            return
        self._status = found["status"]
        self._next_at = now + PLAIN_LINE_S
        note(", ".join(filter(None, (f"{found['status']} {counts(found)}", words.pace(found)))))


def stay_or_name(client: Client, created: Json, *, follow: bool, as_json: bool) -> None:
    """Stay with a batch that was just made, or say which it is."""
    if follow:
        _finish(client, follow_to_end(client, created["id"]), as_json=as_json)
    elif as_json:
        print_json(created)
    else:
        click.echo(created["id"])


def _finish(client: Client, found: Json, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
    _explain_problems(found)
    for line in words.findings(found):
        note(f"  {line}")
    if words.is_caption_job(found):
        for line in words.made_by(client.provenance(found["id"])):
            note(f"  {line}")
    if found["status"] != "completed":
        raise click.ClickException(
            f"the batch is {found['status']}; answered: {counts(found)}. What there is: "
            f"vlmq batch results {found['id']} -o answers.jsonl --errors errors.jsonl"
        )
    errors = " --errors errors.jsonl" if found["request_counts"]["failed"] else ""
    note(
        f"done: {counts(found)}. Read it: vlmq batch results {found['id']} -o answers.jsonl{errors}"
    )
    if words.is_caption_job(found):
        note(
            f"for other tools: vlmq batch export {found['id']} --format parquet -o captions.parquet"
        )


def _explain_problems(found: Json) -> None:
    problems = (found.get("errors") or {}).get("data") or []
    for problem in problems:
        where = f"line {problem['line']}"
        says_where = problem.get("line") is None or problem["message"].startswith(f"{where} ")
        where = "" if says_where else f"{where}: "
        note(f"  {where}{problem['message']} ({problem['code']})")


# --- results ---


def _fetch(client: Client, file_id: str | None, target: Path, what: str) -> None:
    if str(target) == "-":
        stream = sys.stdout.buffer
        for block in client.download(file_id) if file_id else ():
            stream.write(block)
        stream.flush()
        return
    # Under another name until it is whole, so that a broken download is not taken for results.
    part = target.with_name(f".{target.name}.part")
    try:
        with open(part, "wb") as stream:
            for block in client.download(file_id) if file_id else ():
                stream.write(block)
        os.replace(part, target)
    except OSError as error:
        raise click.ClickException(f"cannot write {target}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    note(f"{what}: {target}")
