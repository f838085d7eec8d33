"""``vlmq models``: which checkpoints the server may load, under which names."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from cli.options import json_option, local_options, pairs, read_settings
from cli.output import note, print_json, print_table, when
from shared.models import ModelDefaults, ModelRegistry
from shared.storage import Layout


@click.group()
def models() -> None:
    """Link, list and remove models (on the machine that holds the data)."""


@models.command()
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--trust-remote-code", is_flag=True, help="Allow code inside PATH to run.")
@click.option("--default", "defaults", multiple=True, metavar="NAME=VALUE",
              help="A generation parameter for requests that do not say; repeatable.")  # fmt: skip
@click.option("--engine", help="Serve it with this engine unless the node says otherwise.")
@click.option("--replace", is_flag=True, help="Take the place of a model of the same name.")
@local_options
def link(
    name: str,
    path: Path,
    defaults: tuple[str, ...],
    engine: str | None,
    *,
    trust_remote_code: bool,
    replace: bool,
    config: Path | None,
    data_dir: Path | None,
) -> None:
    """Serve the checkpoint folder PATH as NAME; nothing is copied."""
    record = _registry(config, data_dir).link(
        name,
        path,
        engine=engine,
        trust_remote_code=trust_remote_code,
        defaults=read_defaults(defaults),
        replace=replace,
    )
    when_served = "running nodes that serve every linked model load it now"
    if record.revision > 1:
        when_served = "nodes that serve it replace their engines now, one by one"
    note(f"linked {record.name} to {record.path}; {when_served}")


@models.command()
@click.argument("name")
@local_options
def reload(name: str, config: Path | None, data_dir: Path | None) -> None:
    """Load NAME anew on every node that serves it, without dropping a request."""
    record = _registry(config, data_dir).reload(name)
    note(
        f"{name} is at revision {record.revision}; nodes replace their engines one by one "
        "(vlmq status shows how far they are)"
    )


@models.command("list")
@json_option
@local_options
def list_models(*, as_json: bool, config: Path | None, data_dir: Path | None) -> None:
    """List the linked models."""
    records = _registry(config, data_dir).list()
    if as_json:
        print_json(records)
        return
    rows = [(r.name, r.engine or "-", r.path or "-", when(r.created)) for r in records]
    print_table(("NAME", "ENGINE", "PATH", "LINKED"), rows, "no model is linked yet")


@models.command()
@click.argument("name")
@local_options
def remove(name: str, config: Path | None, data_dir: Path | None) -> None:
    """Forget a model; its folder stays as it is."""
    _registry(config, data_dir).remove(name)
    note(f"removed {name}")


def read_defaults(values: tuple[str, ...]) -> ModelDefaults:
    """``("temperature=0", …)`` as defaults. Raises: click.BadParameter naming the wrong one."""
    try:
        return msgspec.convert(pairs(values), _GivenDefaults, strict=False).complete()
    except msgspec.ValidationError as error:
        raise click.BadParameter(str(error), param_hint="--default") from None


class _GivenDefaults(ModelDefaults, frozen=True, forbid_unknown_fields=True):
    def complete(self) -> ModelDefaults:
        return ModelDefaults(**msgspec.structs.asdict(self))


def _registry(config: Path | None, data_dir: Path | None) -> ModelRegistry:
    layout = Layout(read_settings(config, data_dir).data_dir)
    layout.create()
    return ModelRegistry(layout)
