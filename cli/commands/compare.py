"""``vlmq compare``: the same picture and question to several models, answers side by side."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import click
from rich.table import Table
from rich.text import Text

from cli.client import Client, Json, ServerTrouble
from cli.commands.chat import content
from cli.options import connect, json_option, server_options
from cli.output import note, out, print_json

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PROMPT = "Describe the image."
NARROWEST = 24
"""Columns narrower than this are printed one below the other instead."""


@dataclass(frozen=True)
class Answer:
    """What one model said, or why it did not."""

    model: str
    text: str
    error: str | None = None
    usage: Json | None = None


@click.command()
@click.argument("image")
@click.option("--models", "names", required=True, metavar="A,B[,…]", help="Whom to ask.")
@click.option("-p", "--prompt", default=PROMPT, show_default=True, help="What to ask.")
@click.option("--max-tokens", type=int, help="The longest answer, in tokens.")
@json_option
@server_options
def compare(
    image: str,
    names: str,
    prompt: str,
    max_tokens: int | None,
    *,
    as_json: bool,
    url: str,
    api_key: str | None,
) -> None:
    """Ask each model about IMAGE (PATH, URL or file id) and print the answers side by side.

    Every model takes its likeliest words, so that the answers are those of the models, not of
    chance.
    """
    models = [name.strip() for name in names.split(",") if name.strip()]
    if len(models) < 2:
        raise click.UsageError("name at least two models: --models A,B")
    request: Json = {"temperature": 0, "messages": [_question(prompt, image)]}
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    with connect(url, api_key) as client:
        answers = [_ask(client, {"model": model, **request}) for model in models]
    if as_json:
        print_json([vars(answer) for answer in answers])
    else:
        show(answers, out.width)
    failed = [answer.model for answer in answers if answer.error is not None]
    if failed:
        raise click.ClickException(f"no answer from {', '.join(failed)}")


def show(answers: Sequence[Answer], width: int) -> None:
    """Print the answers in columns, or one below the other where ``width`` characters are few."""
    if width < len(answers) * NARROWEST:
        for answer in answers:
            out.print(Text(answer.model, style="bold"))
            out.print(Text(textwrap.indent(_words(answer), "  ")))
        return
    table = Table(width=width)
    for answer in answers:
        table.add_column(Text(answer.model), overflow="fold", ratio=1)
    table.add_row(*(Text(_words(answer)) for answer in answers))
    out.print(table, soft_wrap=False)


def _question(prompt: str, image: str) -> Json:
    return {"role": "user", "content": content(prompt, [image])}


def _ask(client: Client, request: Json) -> Answer:
    """One after the other: models that share a GPU may take turns on it."""
    pieces: list[str] = []
    usage: Json | None = None
    try:
        for chunk in client.chat({**request, "stream_options": {"include_usage": True}}):
            usage = chunk.get("usage") or usage
            choices = chunk.get("choices") or []
            pieces += [choice.get("delta", {}).get("content") or "" for choice in choices]
    except ServerTrouble as error:
        note(f"{request['model']}: {error.message}")
        return Answer(request["model"], "".join(pieces), error=error.message)
    return Answer(request["model"], "".join(pieces), usage=usage)


def _words(answer: Answer) -> str:
    # A model may say anything, also what a terminal would obey.
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", answer.text)
    if answer.error is None:
        return text
    return f"{text} (broke off)" if text else "(no answer)"
