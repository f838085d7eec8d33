"""Whether a loss is still that of a model that learns. Numbers in, a verdict out."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 20
"""Iterations whose mean is judged; single ones jump."""
FACTOR = 3.0
MARGIN = 1.0


class LossWatch:
    """Watches the loss of every iteration.

    Diverging means that the mean of the last ``WINDOW`` iterations is more than ``FACTOR`` times the
    lowest such mean so far, and ``MARGIN`` more: a loss that was near zero may wobble.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._best = math.inf

    def problem(self, loss: float) -> str | None:
        """Take in one more loss; returns ``nan``, ``diverged``, or None if all is well."""
        if not math.isfinite(loss):
            return "nan"
        self._recent.append(loss)
        if len(self._recent) < WINDOW:
            return None
        mean = sum(self._recent) / WINDOW
        self._best = min(self._best, mean)
        return "diverged" if mean > FACTOR * self._best + MARGIN else None
