"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from cli.client import DEFAULT_URL, Client
from shared.settings import Settings, load_settings, with_overrides

Command = TypeVar("Command", bound=Callable[..., Any])


def server_options(command: Command) -> Command:
    """``--url`` and ``--api-key``: which server, as whom. The command takes ``url, api_key``."""
    command = click.option(
        "--api-key", envvar="VLMQ_API_KEY", help="Your API key.  [env: VLMQ_API_KEY]"
    )(command)
    return click.option(
        "--url",
        envvar="VLMQ_URL",
        default=DEFAULT_URL,
        show_default=True,
        help="The server.  [env: VLMQ_URL]",
    )(command)


def local_options(command: Command) -> Command:
    """``--config`` and ``--data-dir``: which installation. The command takes both."""
    command = click.option(
        "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where data lives."
    )(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="The node's TOML file.",
    )(command)


def json_option(command: Command) -> Command:
    """``--json``: print JSON for programs. The command takes ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def page_options(thing: str) -> Callable[[Command], Command]:
    """``--limit`` and ``--after``: which of many. The command takes both."""

    def add(command: Command) -> Command:
        command = click.option("--after", help=f"Go on after this {thing}.")(command)
        return click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100))(
            command
        )

    return add


def connect(url: str, api_key: str | None) -> Client:
    """A client for these options."""
    return Client(url, api_key)


def read_settings(config: Path | None, data_dir: Path | None) -> Settings:
    """The settings that these options choose. Raises: ConfigurationError."""
    settings = load_settings(config)
    if data_dir is None:
        return settings
    folder = data_dir.expanduser().absolute()
    # Sockets follow the data, unless a run_dir was chosen on purpose.
    run_dir = settings.storage.run_dir
    return with_overrides(settings, storage={"data_dir": str(folder), "run_dir": run_dir})


def pairs(values: Sequence[str]) -> dict[str, str]:
    """``("a=1", …)`` as a dictionary. Raises: click.BadParameter."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{value}' is not NAME=VALUE")
        found[name] = text
    return found
