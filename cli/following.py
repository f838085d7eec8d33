"""Following a batch through restarts of its server: asking again, and lines as they are done."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import click

from cli.client import Client, ServerTrouble
from cli.output import note

POLL_S = 0.5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0
Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns, asked again for as long as waiting may help, ever more slowly.

    Raises: ServerTrouble that does not pass.
    """
    wait_s = FIRST_WAIT_S
    while True:
        try:
            answer = ask()
        except ServerTrouble as error:
            if not error.passing:
                raise
            if wait_s == FIRST_WAIT_S:
                note(f"{error.message.splitlines()[0]}; trying again until it answers")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        else:
            if wait_s > FIRST_WAIT_S:
                note("the server answers again")
            return answer


def follow_results(
    client: Client,
    batch_id: str,
    *,
    output: Path | None,
    errors: Path | None,
    after: int | None,
) -> None:
    """Write a batch's lines as they are done until it has ended, each once.

    Without ``output`` they go to standard output; without ``errors`` failed ones go with the
    others. Files are begun anew, unless ``after`` says after which line of the input to go on.
    Raises: ServerTrouble that does not pass; click.ClickException if a file cannot be written.
    """
    with ExitStack() as opened:
        try:
            mode = "wb" if after is None else "ab"
            answers = _target(output, mode, opened)
            failures = answers if errors is None else _target(errors, mode, opened)
            _Follower(client, batch_id, answers, failures, after or 0).run()
        except OSError as error:
            raise click.ClickException(f"cannot write the lines: {error}") from None


def _target(path: Path | None, mode: str, opened: ExitStack) -> BinaryIO:
    if path is None or str(path) == "-":
        return sys.stdout.buffer
    stream = open(path, mode)  # noqa: SIM115 - closed with the others
    return cast(BinaryIO, opened.enter_context(stream))


class _Follower:
    def __init__(
        self, client: Client, batch_id: str, answers: BinaryIO, failures: BinaryIO, after: int
    ) -> None:
        self._client = client
        self._batch_id = batch_id
        self._answers = answers
        self._failures = failures
        self._after = after

    def run(self) -> None:
        """Until there is nothing more to come."""
        try:
            while not patiently(self._page):
                pass
        except KeyboardInterrupt:
            note(
                "\nthe batch goes on without you. Go on from here: "
                f"vlmq batch results {self._batch_id} --follow --after {self._after}"
            )
            raise

    def _page(self) -> bool:
        """Write what is there after the last line that was written; says whether it was the end."""
        before = self._after
        with self._client.result_lines(self._batch_id, self._after) as lines:
            try:
                for line in lines:
                    self._write(line)
            finally:
                self._answers.flush()
                self._failures.flush()
            self._after = lines.next_after
        if not lines.complete and self._after == before:
            time.sleep(POLL_S)
        return lines.complete

    def _write(self, line: bytes) -> None:
        """Write a line and remember its number: a connection may break after any of them."""
        try:
            row = json.loads(line)
            number = int(row["id"].rpartition("_")[2])
            response = row["response"]
            is_answer = response is not None and response["status_code"] == 200
        except (ValueError, KeyError, TypeError):
            raise ServerTrouble(
                f"the server sent a line that is no result after line {self._after}"
            ) from None
        (self._answers if is_answer else self._failures).write(line)
        self._after = number
