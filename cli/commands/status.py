"""``vlmq status``: what runs, on which machine, and how it is."""

from __future__ import annotations

from pathlib import Path

import click

from cli.client import ServerTrouble
from cli.options import connect, json_option, local_options, read_settings, server_options
from cli.output import note, print_json, print_table
from shared.connection import connect as connect_redis
from shared.errors import QueueUnavailable
from shared.presence import NODE_TTL_S, NodeReport, Presence
from shared.settings import Settings

_AILING = frozenset({"starting", "restarting", "failed"})


@click.command()
@json_option
@local_options
@server_options
def status(
    *,
    as_json: bool,
    config: Path | None,
    data_dir: Path | None,
    url: str,
    api_key: str | None,
) -> None:
    """Show the API's readiness and every node's programs. Exits with 1 if the API is not ready."""
    ready, says = _api(url, api_key)
    nodes = live_nodes(read_settings(config, data_dir))
    if as_json:
        print_json({"api": {"url": url, "ready": ready, **says}, "nodes": nodes})
    else:
        _print(url, ready=ready, says=says, nodes=nodes)
    if not ready:
        raise click.exceptions.Exit(1)


def live_nodes(settings: Settings) -> list[NodeReport] | None:
    """The nodes that are alive, or None when Redis cannot be asked from here."""
    client = connect_redis(settings, max_connections=1)
    try:
        return Presence(client).nodes()
    except QueueUnavailable:
        return None
    finally:
        client.close()


@click.command()
@local_options
def health(config: Path | None, data_dir: Path | None) -> None:
    """Say whether this machine's node is well; exits with 1 if not. For probes of 'vlmq worker'.

    It is well when it has reported to Redis within the last seconds and none of its programs has
    failed, is restarting or still starting.
    """
    settings = read_settings(config, data_dir)
    client = connect_redis(settings, max_connections=1)
    try:
        nodes = Presence(client).nodes()
    finally:
        client.close()
    name = settings.node.name
    ailments = _ailments([node for node in nodes if node.node == name], name)
    if ailments:
        raise click.ClickException("; ".join(ailments))
    click.echo(f"{name}: everything is ready")


def _ailments(nodes: list[NodeReport], name: str) -> list[str]:
    if not nodes:
        return [f"no node '{name}' has reported within the last {NODE_TTL_S:g} s"]
    return [
        f"{program} {state}{detail}"
        for node in nodes
        for program, state, detail in (
            *((program, state, "") for program, state in node.programs.items()),
            *(
                (f"{r.model}/{r.replica}", r.state, f" ({r.detail})" if r.detail else "")
                for r in node.replicas
                # One that is loaded on demand, or replaced, starts because all is well.
                if r.state != "starting" or r.model not in node.obtainable
            ),
        )
        if state in _AILING
    ]


def _api(url: str, api_key: str | None) -> tuple[bool, dict[str, object]]:
    try:
        with connect(url, api_key) as client:
            return client.readiness()
    except ServerTrouble as error:
        return False, {"status": "unreachable", "message": error.message}


def _print(
    url: str, *, ready: bool, says: dict[str, object], nodes: list[NodeReport] | None
) -> None:
    click.echo(f"API {url}: {'ready' if ready else says.get('message') or says}")
    if nodes is None:
        note("Redis cannot be reached from here, so nodes are not shown (--config or --data-dir?)")
        return
    rows: list[tuple[object, ...]] = []
    for node in nodes:
        rows += [(node.node, name, state, "", "") for name, state in node.programs.items()]
        rows += [
            (node.node, f"{r.model}/{r.replica}", r.state, r.restarts or "", r.detail)
            for r in node.replicas
        ]
    print_table(("NODE", "PROGRAM", "STATE", "RESTARTS", "DETAIL"), rows, "no node is running")
