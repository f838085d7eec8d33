"""The rows of a batch over HTTP, each once and in order, through broken connections and restarts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from cli.client import Client, ServerTrouble
from cli.following import FIRST_WAIT_S, LONGEST_WAIT_S
from cli.output import note
from shared.result_rows import ResultRow

_PATIENCE_S = 600.0
"""Without a row for so long, the server will not come back by itself."""
_PAGE_ROWS = 1000
_PAGE_ROWS_WITH_MESSAGES = 100
_row = msgspec.json.Decoder(ResultRow)


class RowStream:
    """Iterates over the rows that are done; ``complete`` then says whether the batch had ended."""

    def __init__(self, client: Client, batch_id: str, *, with_messages: bool) -> None:
        self.complete = False
        self._client = client
        self._batch_id = batch_id
        self._with_messages = with_messages
        self._after = 0

    def __iter__(self) -> Iterator[ResultRow]:
        """The rows, one at a time. Raises: ServerTrouble that does not pass, or not in time."""
        wait_s, waited_s = FIRST_WAIT_S, 0.0
        while True:
            before = self._after
            try:
                yield from self._page()
            except ServerTrouble as error:
                if self._after > before:
                    wait_s, waited_s = FIRST_WAIT_S, 0.0
                if not error.passing or waited_s > _PATIENCE_S:
                    raise
                if not waited_s:
                    note(f"{error.message.splitlines()[0]}; trying again")
                time.sleep(wait_s)
                waited_s += wait_s
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                wait_s, waited_s = FIRST_WAIT_S, 0.0
                if self.complete or self._after == before:
                    return

    def _page(self) -> Iterator[ResultRow]:
        with self._client.rows(
            self._batch_id,
            after=self._after,
            limit=_PAGE_ROWS_WITH_MESSAGES if self._with_messages else _PAGE_ROWS,
            with_messages=self._with_messages,
        ) as lines:
            for line in lines:
                row = self._decoded(line)
                self._after = row.line
                yield row
            self._after = lines.next_after
            self.complete = lines.complete

    def _decoded(self, line: bytes) -> ResultRow:
        try:
            return _row.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ServerTrouble(
                f"the server sent a line that is no row after line {self._after}"
            ) from None
