"""The command ``vlmq``. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

import click

from cli.commands.batch import batch
from cli.commands.caption import caption
from cli.commands.chat import chat
from cli.commands.compare import compare
from cli.commands.doctor import doctor
from cli.commands.finetune import finetune
from cli.commands.keys import keys
from cli.commands.models import models
from cli.commands.node import up, worker
from cli.commands.pull import pull_model
from cli.commands.status import health, status
from shared.errors import VlmqError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("vlmq"), prog_name="vlmq")
def vlmq() -> None:
    """A self-hosted job queue for vision-language models."""


for command in (
    up,
    worker,
    chat,
    caption,
    compare,
    batch,
    finetune,
    models,
    status,
    health,
    keys,
    doctor,
):
    vlmq.add_command(command)
models.add_command(pull_model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        code = vlmq.main(arguments, prog_name="vlmq", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("\ninterrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VlmqError as error:
        click.echo(f"Error: {error.message}", err=True)
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
