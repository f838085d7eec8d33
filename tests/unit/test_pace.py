"""How fast a batch is said to be, by the moments in its record."""

from __future__ import annotations

from typing import Any

import pytest

from shared.jobs import Batch, BatchState
from shared.pace import items_per_second, seconds_left


def batch(**fields: Any) -> Batch:
    """A batch that began at second 1000 of Redis's clock and was committed to at 1010."""
    values: dict[str, Any] = {
        "id": "batch_1", "owner": "ann", "endpoint": "e", "input_file_id": "file-1",
        "completion_window": "24h", "created_at": 0, "expires_at": 0,
        "state": BatchState.IN_PROGRESS, "total": 1000, "completed": 90, "failed": 10,
        "started_ms": 1_000_000, "from_ms": 1_000_000, "committed_ms": 1_010_000, **fields,
    }  # fmt: skip
    return Batch(**values)


def test_nothing_is_said_before_anything_is_done() -> None:
    """Neither without a chunk claimed."""
    assert items_per_second(batch(completed=0, failed=0, committed_ms=None), 1005) is None
    assert seconds_left(batch(started_ms=None, from_ms=None), 1010) is None


def test_failed_lines_are_done_too() -> None:
    """They took their time."""
    assert items_per_second(batch(), 1010) == 10
    assert seconds_left(batch(), 1010) == 90


def test_the_wait_for_the_next_chunk_does_not_slow_the_rate() -> None:
    """Unless it is longer than all that was measured."""
    assert items_per_second(batch(), 1019) == 10
    assert items_per_second(batch(), 1030) == 5
    assert seconds_left(batch(), 1110) == 900


def test_the_rate_is_that_of_the_last_while() -> None:
    """What was before the older mark does not count."""
    recent = batch(from_ms=1_008_000, from_done=60)
    assert items_per_second(recent, 1010) == 20


def test_a_batch_that_ended_has_the_rate_of_the_whole() -> None:
    """Without lines that never ran or were done before Redis was lost; and no time left."""
    ended = batch(state=BatchState.COMPLETED, from_ms=1_009_000, from_done=99)
    assert items_per_second(ended, 9999) == 10
    assert seconds_left(ended, 9999) is None
    stopped = batch(state=BatchState.CANCELLED, failed=910, counts={"failed:batch_cancelled": 900})
    assert items_per_second(stopped, 9999) == 10
    assert items_per_second(batch(state=BatchState.COMPLETED, started_done=50), 9999) == 5


def test_no_time_is_left_for_what_is_to_stop() -> None:
    """It will not be done."""
    assert seconds_left(batch(stop_reason="cancelled"), 1010) is None


@pytest.mark.parametrize("committed_ms", [1_000_000, 999_000])
def test_a_clock_that_stands_or_goes_back_makes_no_error(committed_ms: int) -> None:
    """The rate is then high, not infinite."""
    rate = items_per_second(batch(committed_ms=committed_ms), 0)
    assert rate is not None
    assert 0 < rate <= 100_000
