"""``vlmq caption --dry-run``: what a caption job would come to, by a batch of a few images of its set."""

from __future__ import annotations

import json
from itertools import islice

import click

from cli import batch_words as words
from cli.client import Client, Json
from cli.output import note, print_json

SAMPLE_IMAGES = 64
EXAMPLES = 5


def show_preflight(client: Client, ended: Json, *, as_json: bool) -> None:
    """Print the forecast and some captions; with ``as_json`` the batch and ``examples``.

    Raises: click.ClickException if the sample could not be captioned.
    """
    if ended["status"] != "completed":
        for problem in (ended.get("errors") or {}).get("data") or []:
            note(f"  {problem['message']} ({problem['code']})")
        raise click.ClickException(
            f"the sample is {ended['status']}; nothing can be said of the set"
        )
    examples = _examples(client, ended["id"])
    if as_json:
        print_json({**ended, "examples": examples})
        return
    for line in (*words.forecast(ended), *words.findings(ended)):
        click.echo(line)
    for example in examples:
        click.echo(f"{example['custom_id']}: {words.short(example['caption'])}")


def _examples(client: Client, batch_id: str) -> list[Json]:
    """The first captions of the sample, by the names of their images."""
    with client.result_lines(batch_id, 0) as lines:
        rows = (json.loads(line) for line in lines)
        answers = (row for row in rows if (row["response"] or {}).get("status_code") == 200)
        return [
            {
                "custom_id": row["custom_id"],
                "caption": row["response"]["body"]["choices"][0]["message"]["content"],
            }
            for row in islice(answers, EXAMPLES)
        ]
