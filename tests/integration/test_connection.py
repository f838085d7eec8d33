"""A Redis that is there and refuses to write is as unavailable as one that is away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.errors import QueueUnavailable
from shared.jobs import BatchSpec
from shared.presence import NodeReport
from shared.stores import Stores


@pytest.fixture
def full_redis(own_stores: Stores) -> Iterator[Stores]:
    """Stores whose Redis has no memory left for anything."""
    own_stores.redis.config_set("maxmemory", 1)
    yield own_stores
    own_stores.redis.config_set("maxmemory", 0)


def test_a_refused_command_is_queue_unavailable(full_redis: Stores) -> None:
    """Whose message the server begins."""
    with pytest.raises(QueueUnavailable, match="refuses to write"):
        full_redis.redis.set("vlmq:test", b"x")


def test_a_refused_pipeline_is_queue_unavailable(full_redis: Stores) -> None:
    """Whose message begins with the number of the command that was refused."""
    with pytest.raises(QueueUnavailable):
        full_redis.presence.announce(NodeReport("here", 1))


def test_a_refused_script_is_queue_unavailable(full_redis: Stores) -> None:
    """Whose error names the script's line."""
    spec = BatchSpec(
        id="batch_1",
        owner="ann",
        endpoint="/v1/chat/completions",
        input_file_id="file-1",
        completion_window="24h",
        created_at=1,
        expires_at=2,
    )
    with pytest.raises(QueueUnavailable):
        full_redis.batches.enter(spec)
