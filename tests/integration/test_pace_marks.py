"""What Redis notes of a batch as its chunks are claimed and committed: moments, counts, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.pace import items_per_second
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.stored_batches import claim, commit, link_model, now, planned

SMALL = {"queue": {"chunk_items": 1, "min_chunk_items": 1}}


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that cut a chunk for each line."""
    with connected(store_settings(redis_url, tmp_path, **SMALL)) as found:
        yield found


def age(stores: Stores, batch_id: str, seconds: int) -> None:
    """Let all moments of a batch be so much longer ago."""
    name = f"vlmq:batch:{batch_id}"
    for field in ("started_ms", "committed_ms", "from_ms", "mark_ms"):
        if stores.redis.hexists(name, field):
            stores.redis.hincrby(name, field, -1000 * seconds)


def test_a_batch_is_measured_from_its_first_claim(stores: Stores) -> None:
    """Not from when it was made; further claims do not begin anew."""
    link_model(stores)
    batch = planned(stores, 3)
    assert now(stores, batch).started_ms is None
    first = claim(stores)
    started = now(stores, batch).started_ms
    assert started is not None
    assert items_per_second(now(stores, batch), 0) is None
    second = claim(stores)
    age(stores, batch.id, 20)
    commit(stores, first)
    found = now(stores, batch)
    assert found.started_ms == started - 20_000
    rate = items_per_second(found, 0)
    assert rate is not None
    assert 1 / 25 < rate <= 1 / 20
    commit(stores, second, completed=0, failed=1)
    found = now(stores, batch)
    assert found.counts == {"failed:made_up": 1}
    assert found.output_bytes == len("out 0\n")


def test_the_rate_forgets_what_was_long_ago(stores: Stores) -> None:
    """Once enough was committed since the last mark."""
    link_model(stores)
    batch = planned(stores, 40)
    for _ in range(4):
        commit(stores, claim(stores))
    age(stores, batch.id, 3600)
    for _ in range(3):
        commit(stores, claim(stores))
    assert now(stores, batch).from_done == 0  # too few chunks to tell a rate by
    commit(stores, claim(stores))
    # The mark that was made at the beginning is now the older one, and this moment the newer.
    assert now(stores, batch).from_done == 0
    age(stores, batch.id, 40)
    for _ in range(8):
        commit(stores, claim(stores))
    found = now(stores, batch)
    assert found.from_done == 8
    rate = items_per_second(found, 0)
    assert rate is not None
    assert 8 / 45 < rate <= 8 / 40
