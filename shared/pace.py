"""How fast a batch is done and when it will be, from the moments in its record (pure)."""

from __future__ import annotations

import math

from shared.jobs import Batch

MIN_S = 0.001
"""Redis tells milliseconds; what took less is taken to have taken one."""


def items_per_second(batch: Batch, now_s: float) -> float | None:
    """How many lines a second are done now, or were on the whole if it has ended; None before any.

    ``now_s`` is in Unix seconds, by whatever clock: it only matters after a long silence.
    """
    done = batch.completed + batch.failed
    if batch.started_ms is None or batch.committed_ms is None or done == 0:
        return None
    if batch.is_terminal:
        ran = done - sum(batch.counts.get(name, 0) for name in _NEVER_RAN)
        return (ran - batch.started_done) / _seconds(batch.committed_ms - batch.started_ms)
    since_ms = batch.started_ms if batch.from_ms is None else batch.from_ms
    # Commits come in bursts; only a silence longer than all that was measured slows the rate.
    measured_ms = max(batch.committed_ms - since_ms, now_s * 1000 - batch.committed_ms)
    return (done - batch.from_done) / _seconds(measured_ms)


def seconds_left(batch: Batch, now_s: float) -> int | None:
    """How long what is known of the batch will take at its rate; None if that cannot be said."""
    if batch.is_terminal or batch.stop_reason is not None:
        return None
    rate = items_per_second(batch, now_s)
    if not rate:
        return None
    return math.ceil((batch.total - batch.completed - batch.failed) / rate)


_NEVER_RAN = ("failed:batch_cancelled", "failed:batch_expired")


def _seconds(milliseconds: float) -> float:
    return max(MIN_S, milliseconds / 1000)
