"""Of a batch's lines, those that the quality gate wants a person to look at."""

from __future__ import annotations

from collections.abc import Iterator

from shared.results import ResultPage

_MARK = b'"vlmq":{"quality":{"verdict":"review"'
"""As the consumer writes it. Inside a text the quotes would have backslashes, so nothing else is this."""


class ReviewPage:
    """The lines of a page of results that are to be reviewed; cursors are those of the results."""

    def __init__(self, page: ResultPage) -> None:
        self._page = page
        self.next_after = page.next_after
        self.complete = page.complete

    def blocks(self) -> Iterator[bytes]:
        """The lines, in blocks. Raises: as the page's own ``blocks``."""
        for block in self._page.blocks():
            found = b"".join(line for line in block.splitlines(keepends=True) if _MARK in line)
            if found:
                yield found
