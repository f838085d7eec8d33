"""From tokens to text that may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.inference.engines.stopping import StopStrings

_WINDOW = 48
_CONTEXT = 8
_BROKEN = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class TextStream:
    """The text of one answer as its tokens arrive.

    Only a window of the last tokens is decoded, so the cost per token does not grow with the
    answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = StopStrings(stops)
        self._tokens: list[int] = []
        self._given = 0  # characters of the window's text that left it
        self._stopped = False

    def has_stopped(self) -> bool:
        """Whether a stop string was met; no more text follows it."""
        return self._stopped

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, often none."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        # An unfinished character shows as exactly one replacement mark at the end.
        certain = text[:-1] if text.endswith(_BROKEN) else text
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        self._slide(finished=len(certain) == len(text))
        return self._passed(piece)

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.has_stopped():
            return ""
        rest = self._passed(self._decode(self._tokens)[self._given :])
        return rest if self.has_stopped() else rest + self._stops.flush()

    def _slide(self, *, finished: bool) -> None:
        if len(self._tokens) < _WINDOW or not (finished or len(self._tokens) > 2 * _WINDOW):
            return
        self._tokens = self._tokens[-_CONTEXT:]
        text = self._decode(self._tokens)
        self._given = len(text) if finished else len(text.removesuffix(_BROKEN))

    def _passed(self, piece: str) -> str:
        shown, self._stopped = self._stops.push(piece)
        return shown
