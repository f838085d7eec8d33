"""``vlmq keys``: who may use the server."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from cli.options import json_option, local_options, read_settings
from cli.output import note, print_json, print_table, when
from shared.keys import KeyStore
from shared.storage import Layout


@click.group()
def keys() -> None:
    """Create, list and revoke API keys (on the machine that holds the data)."""


@keys.command()
@click.argument("owner")
@click.option("--name", default="", help="What the key is for.")
@json_option
@local_options
def create(
    owner: str,
    name: str,
    *,
    as_json: bool,
    config: Path | None,
    data_dir: Path | None,
) -> None:
    """Make a key for OWNER; the secret is shown this once."""
    store = _store(config, data_dir)
    first = not store.required()
    record, secret = store.create(owner, name=name)
    if as_json:
        print_json({**_public(record), "key": secret})
    else:
        click.echo(secret)
        note(f"key {record.id} for {owner}; it is not shown again")
    if first:
        note("from now on every request needs a key")
        note(
            "files and batches made without one belong to 'local': vlmq keys create local sees them"
        )


@keys.command("list")
@json_option
@local_options
def list_keys(*, as_json: bool, config: Path | None, data_dir: Path | None) -> None:
    """List the keys, without their secrets."""
    records = _store(config, data_dir).list()
    if as_json:
        print_json([_public(record) for record in records])
        return
    rows = [(r.id, r.owner, r.name, when(r.created_at)) for r in records]
    print_table(("ID", "OWNER", "NAME", "CREATED"), rows, "there are no keys")


@keys.command()
@click.argument("key_id", metavar="ID")
@local_options
def revoke(key_id: str, config: Path | None, data_dir: Path | None) -> None:
    """Make a key worthless at once."""
    _store(config, data_dir).revoke(key_id)
    note(f"revoked {key_id}")


def _store(config: Path | None, data_dir: Path | None) -> KeyStore:
    layout = Layout(read_settings(config, data_dir).data_dir)
    layout.create()
    return KeyStore(layout.keys)


def _public(record: msgspec.Struct) -> dict[str, object]:
    return {k: v for k, v in msgspec.structs.asdict(record).items() if k != "digest"}
