"""``vlmq doctor``: look at everything an installation needs, say what is wrong and what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import msgspec

from cli.commands.status import live_nodes
from cli.options import json_option, local_options, read_settings
from cli.output import note, print_json
from shared.checkpoints import CONFIG, check_checkpoint
from shared.connection import connect
from shared.errors import CheckpointInvalid, VlmqError
from shared.keys import KeyStore
from shared.models import ModelRecord, ModelRegistry, reads_checkpoints
from shared.presence import NodeReport
from shared.settings import Settings
from shared.storage import Layout, write_bytes

Verdict = Literal["ok", "warning", "problem"]
_ENGINE_NEEDS = {"transformers": ("torch", "transformers"), "lmdeploy": ("lmdeploy",)}


_AT_REST = ("ready", "unloaded", "lent")


@dataclass(frozen=True)
class Finding:
    """What one check found; ``advice`` says what to do about it."""

    check: str
    verdict: Verdict
    message: str
    advice: str = ""


@click.command()
@click.option("--rebuild", "rebuilding", is_flag=True,
              help="Restore Redis from the records on shared storage.")  # fmt: skip
@json_option
@local_options
def doctor(*, rebuilding: bool, as_json: bool, config: Path | None, data_dir: Path | None) -> None:
    """Check storage, disk, Redis, nodes, models and keys. Exits with 1 if something is broken."""
    settings = read_settings(config, data_dir)
    if rebuilding:
        _rebuild(settings, as_json=as_json)
        return
    findings = list(examine(settings))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{finding.verdict:8} {finding.check:8} {finding.message}")
            if finding.advice:
                click.echo(f"{'':17} -> {finding.advice}")
    if any(finding.verdict == "problem" for finding in findings):
        raise click.exceptions.Exit(1)


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check's findings, in order; a check that cannot run is itself a problem."""
    checks: dict[str, Callable[[Settings], Iterator[Finding]]] = {
        "storage": _storage,
        "disk": _disk,
        "nodes": _nodes,
        "models": _models,
        "keys": _keys,
    }
    for name, check in checks.items():
        try:
            yield from check(settings)
        except VlmqError as error:
            yield Finding(name, "problem", error.message)


def _storage(settings: Settings) -> Iterator[Finding]:
    Layout(settings.data_dir).create()
    probe = settings.data_dir / f".doctor-{os.getpid()}"
    write_bytes(probe, b"")
    probe.unlink()
    yield Finding("storage", "ok", f"{settings.data_dir} can be written")


def _disk(settings: Settings) -> Iterator[Finding]:
    free = shutil.disk_usage(settings.data_dir).free
    least = settings.storage.min_free_bytes
    message = f"{free / 2**30:.1f} GiB free, {least / 2**30:.2f} GiB are kept"
    if free < least:
        advice = "free some space; uploads and batches are refused until then"
        yield Finding("disk", "problem", message, advice)
    else:
        yield Finding("disk", "ok" if free > 4 * least else "warning", message)


def _nodes(settings: Settings) -> Iterator[Finding]:
    nodes = live_nodes(settings)
    if nodes is None:
        advice = "start one with 'vlmq up', or set redis.url to the one that runs"
        yield Finding("redis", "problem", "Redis does not answer", advice)
        return
    missing = _missing_jobs(settings)
    if missing:
        message = f"answers, but {missing} on shared storage are not in it"
        yield Finding("redis", "problem", message, "put them back: vlmq doctor --rebuild")
    else:
        yield Finding("redis", "ok", "answers")
    if not nodes:
        advice = "start one with 'vlmq up' or 'vlmq worker'"
        yield Finding("nodes", "warning", "no node is running", advice)
    for node in nodes:
        broken = [
            f"{r.model}/{r.replica} {r.state}" for r in node.replicas if r.state not in _AT_REST
        ]
        broken += [f"{name} {state}" for name, state in node.programs.items() if state != "ready"]
        if broken:
            advice = f"see the logs on it, in {settings.data_dir / 'logs'}"
            yield Finding("nodes", "warning", f"{node.node}: {', '.join(broken)}", advice)
        else:
            yield Finding("nodes", "ok", f"{node.node}: everything is ready")
        for model, trouble in _refused(node).items():
            advice = f"mend it, then: vlmq models reload {model}"
            yield Finding("nodes", "warning", f"{node.node}: {model}: {trouble}", advice)


def _refused(node: NodeReport) -> dict[str, str]:
    """Models that work, but not in their newest revision, and why."""
    return {r.model: r.detail for r in node.replicas if r.state == "ready" and r.detail}


def _missing_jobs(settings: Settings) -> str:
    """What Redis lacks, e.g. ``2 batches``; empty if nothing."""
    # Only this needs the jobs' stores, and with them Celery.
    from shared.rebuild import missing_batches, missing_finetunes

    client = connect(settings)
    layout = Layout(settings.data_dir)
    try:
        found = {
            "batches": missing_batches(client, layout),
            "fine-tunes": missing_finetunes(client, layout),
        }
    finally:
        client.close()
    return " and ".join(f"{count} {kind}" for kind, count in found.items() if count)


def _models(settings: Settings) -> Iterator[Finding]:
    records = ModelRegistry(Layout(settings.data_dir)).list()
    if not records:
        yield Finding("models", "warning", "no model is linked", "vlmq models link NAME PATH")
    for record in records:
        yield _model(record)


def _model(record: ModelRecord) -> Finding:
    if record.path is not None and not (Path(record.path) / CONFIG).is_file():
        advice = f"put it back, or: vlmq models remove {record.name}"
        gone = f"{record.name}: {record.path} holds no checkpoint any more"
        return Finding("models", "problem", gone, advice)
    if record.path is not None and reads_checkpoints(record.engine):
        try:
            check_checkpoint(Path(record.path), pickles=record.trust_remote_code)
        except CheckpointInvalid as error:
            advice = f"repair the folder, or: vlmq models remove {record.name}"
            return Finding("models", "problem", f"{record.name}: {error.message}", advice)
    engine = record.engine or "transformers"
    missing = [m for m in _ENGINE_NEEDS.get(engine, ()) if importlib.util.find_spec(m) is None]
    if missing:
        message = f"{record.name}: its engine '{engine}' needs {', '.join(missing)}"
        advice = "not installed in this environment; a worker elsewhere may have it"
        return Finding("models", "warning", message, advice)
    return Finding("models", "ok", f"{record.name}: {record.path or f'engine {engine}'}")


def _keys(settings: Settings) -> Iterator[Finding]:
    store = KeyStore(Layout(settings.data_dir).keys)
    if store.required():
        yield Finding("keys", "ok", f"{len(store.list())} API key(s)")
    else:
        yield Finding("keys", "ok", "no API keys: the server listens on this machine only")


def _rebuild(settings: Settings, *, as_json: bool) -> None:
    # Only this needs the stores, and with them Celery.
    from shared.stores import Stores

    stores = Stores.connect(settings)
    try:
        report = msgspec.to_builtins(stores.rebuild())
    finally:
        stores.close()
    if as_json:
        print_json(report)
        return
    for name, value in report.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")
    note("Redis agrees with the records on shared storage")
