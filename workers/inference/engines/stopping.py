"""Stop strings on text that arrives in pieces.

The answer ends where a stop string is first complete; if several end at the same character, the
longest one counts. That depends on the text alone, not on how it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import InvalidValue


class StopStrings:
    """Passes text on, and holds back what may turn out to begin a stop string.

    Raises: InvalidValue for an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidValue("a stop string must not be empty", param="stop")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns what may be shown now and whether a stop string was completed; after that, nothing
        more comes out.
        """
        if not self._stops:
            return text, False
        if self._stopped:
            return "", True
        text = self._held + text
        cut = self._first_stop(text)
        if cut is not None:
            self._held, self._stopped = "", True
            return text[:cut], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text still held back; call it when the answer ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that is complete first begins."""
        spans = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(spans)[1] if spans else None


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
