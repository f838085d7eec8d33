"""``vlmq up`` and ``vlmq worker``: become the node that runs everything on this machine.

The node is a program of its own (``workers.node``); this process turns into it, so that signals
and the exit status are the node's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import click

from cli.options import local_options, read_settings
from shared.settings import Settings, load_settings, snapshot, with_overrides

WORKER_ROLES = ("chat", "batch", "engines", "reaper", "finetune")


@click.command()
@local_options
@click.option("--host", help="The address the API listens on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="The API's port.  [default: 8000]")
@click.option("--engine", help="Serve only one model, with this engine (echo, transformers, …).")
@click.option("--model", help="The model to serve.  [default: every linked model]")
def up(
    config: Path | None,
    data_dir: Path | None,
    host: str | None,
    port: int | None,
    engine: str | None,
    model: str | None,
) -> None:
    """Run everything on this machine: API, queue, engines, and Valkey unless redis.url is set.

    Without any configuration it serves every linked model, or else a small one that comes with
    vlmq. With --engine echo nothing heavy is needed.
    """
    settings = read_settings(config, data_dir)
    given = {"host": host, "port": port}
    api = {name: value for name, value in given.items() if value is not None}
    settings = with_overrides(settings, api=api, node=_serve(engine, model))
    if settings.redis.url is not None:
        roles = [role for role in settings.node.roles if role != "redis"]
        settings = with_overrides(settings, node={"roles": roles})
    _become_node(settings)


@click.command()
@local_options
def worker(config: Path | None, data_dir: Path | None) -> None:
    """Run this machine's workers: consumers, engines, reaper.

    The API and Redis run elsewhere, unless the configuration's node.roles says otherwise.
    """
    configured = load_settings(config).node
    roles = configured.roles if "roles" in configured.model_fields_set else WORKER_ROLES
    settings = with_overrides(read_settings(config, data_dir), node={"roles": roles})
    _become_node(settings)


def _serve(engine: str | None, model: str | None) -> dict[str, Any]:
    if engine is None and model is None:
        return {}
    name = model or ("echo" if engine == "echo" else None)
    if name is None:
        raise click.UsageError("--engine needs --model NAME, the linked model to serve with it")
    entry = {"model": name} if engine is None else {"model": name, "engine": engine}
    return {"serve": [entry]}


def _become_node(settings: Settings) -> NoReturn:
    # Readable by this user only: redis.url may hold a password.
    descriptor, path = tempfile.mkstemp(prefix="vlmq-", suffix=".json")
    with os.fdopen(descriptor, "w") as stream:
        json.dump(snapshot(settings), stream)
    sys.stdout.flush()
    command = [sys.executable, "-m", "workers.node", "--config", path, "--discard-config"]
    # The node takes this process's place.
    os.execv(sys.executable, command)
