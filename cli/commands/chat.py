"""``vlmq chat``: talk with a model about images, in the terminal."""

from __future__ import annotations

import base64
import mimetypes
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cli.client import Client, Json, ServerTrouble
from cli.options import connect, json_option, server_options
from cli.output import note, print_json

_REMOTE = re.compile(r"(https?://|data:|file-)")
_HELP = "/image PATH adds an image to your next message, /new starts afresh, /exit leaves"


@click.command()
@click.argument("model")
@click.option("-m", "--message", help="Ask this, print the answer and leave.")
@click.option("-i", "--image", "images", multiple=True, help="PATH, URL or file id; repeatable.")
@click.option("-s", "--system", help="The system prompt.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=int, help="The longest answer, in tokens.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@json_option
@server_options
def chat(
    model: str,
    message: str | None,
    images: tuple[str, ...],
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    *,
    as_json: bool,
    url: str,
    api_key: str | None,
) -> None:
    """Talk with MODEL: one question with -m (or on standard input), else a conversation."""
    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    parameters = {name: value for name, value in given.items() if value is not None}
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise click.UsageError("nothing was asked; use -m TEXT or standard input")
    with connect(url, api_key) as client:
        conversation = Conversation(client, model, parameters, system)
        if message is not None:
            conversation.ask(message, images, quiet=as_json)
            if as_json:
                print_json({"model": model, **conversation.last})
        elif as_json:
            raise click.UsageError("--json needs -m TEXT")
        else:
            _converse(conversation, list(images))


class Conversation:
    """The messages so far; a question that fails leaves them as they were."""

    def __init__(self, client: Client, model: str, parameters: Json, system: str | None) -> None:
        self._client = client
        self._request: Json = {"model": model, **parameters}
        self._opening: list[Json] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self.last: Json = {}
        """The last answer: ``content``, ``finish_reason`` and ``usage``."""

    def ask(self, text: str, images: Sequence[str] = (), *, quiet: bool = False) -> None:
        """Send a message and print the answer as it comes."""
        question = {"role": "user", "content": content(text, images)}
        pieces: list[str] = []
        self.last = {"content": "", "finish_reason": None, "usage": None}
        body = {**self._request, "messages": [*self._messages, question]}
        for chunk in self._client.chat({**body, "stream_options": {"include_usage": True}}):
            piece = self._read(chunk)
            pieces.append(piece)
            if not quiet:
                click.echo(piece, nl=False)
        if not quiet:
            click.echo()
        answer = "".join(pieces)
        self.last["content"] = answer
        self._messages += [question, {"role": "assistant", "content": answer}]
        if self.last["finish_reason"] == "length":
            note("(cut off at the token limit; --max-tokens allows more)")

    def forget(self) -> None:
        """Start afresh."""
        self._messages = list(self._opening)

    def _read(self, chunk: Json) -> str:
        if chunk.get("usage"):
            self.last["usage"] = chunk["usage"]
        choices = chunk.get("choices") or []
        if not choices:
            return ""
        reason = choices[0].get("finish_reason")
        if reason:
            self.last["finish_reason"] = reason
        return str(choices[0].get("delta", {}).get("content") or "")


def _converse(conversation: Conversation, waiting: list[str]) -> None:
    note(_HELP)
    while True:
        try:
            line = click.prompt("you", prompt_suffix="> ", default="", show_default=False).strip()
        except click.Abort:
            # End of input or Ctrl-C at the prompt: the usual ways to leave a conversation.
            click.echo()
            return
        word, _, rest = line.partition(" ")
        match word:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/new":
                conversation.forget()
                waiting.clear()
            case "/image":
                _add_image(waiting, rest.strip())
            case _ if word.startswith("/"):
                note(_HELP)
            case _:
                _ask(conversation, line, waiting)


def _add_image(waiting: list[str], place: str) -> None:
    try:
        image_url(place)
    except click.ClickException as error:
        note(error.message)
        return
    waiting.append(place)
    note(f"{len(waiting)} image(s) go with your next message")


def _ask(conversation: Conversation, line: str, waiting: list[str]) -> None:
    try:
        conversation.ask(line, waiting)
        waiting.clear()
    except ServerTrouble as error:
        note(f"Error: {error.message}")
    except KeyboardInterrupt:
        note("\n(stopped; this question is not part of the conversation)")


def content(text: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
    """A message's content: its images first, then its text.

    Raises: click.BadParameter for an image that cannot be read.
    """
    if not images:
        return text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": image_url(place)}} for place in images
    ]
    return [*parts, {"type": "text", "text": text}]


def image_url(place: str) -> str:
    """A URL the server can read: URLs and file ids as they are, local files as ``data:``."""
    if _REMOTE.match(place):
        return place
    path = Path(place).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise click.BadParameter(f"{place}: {error.strerror}", param_hint="image") from None
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
