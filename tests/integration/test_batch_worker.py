"""One batch process on a real Valkey that comes and goes."""

from __future__ import annotations

from pathlib import Path

from shared.leases import CONTROL_LANE
from tests.conftest import connected, store_settings
from workers.batch_worker import BatchWorker


def test_one_started_before_redis_works_once_it_is_there(redis_url: str, tmp_path: Path) -> None:
    """Its tickets must not be taken and lost; and the reaper must know it, then and after a wipe."""
    socket = tmp_path / "redis.sock"
    settings = store_settings(f"unix://{socket}", tmp_path)
    worker = BatchWorker(settings, "w", is_draining=lambda: False, must_stop=lambda: False)
    worker.run_slice(CONTROL_LANE)
    socket.symlink_to(redis_url.removeprefix("unix://"))
    with connected(settings) as stores:
        for _ in range(2):
            worker.run_slice(CONTROL_LANE)
            assert stores.leases.workers() == ["w"]
            stores.redis.flushall()
