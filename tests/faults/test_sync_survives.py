"""Syncs of image sets over killed programs, and over a full disk."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.batches import (
    assert_nothing_left,
    results,
    wait_until_done,
    wait_until_ended,
)
from tests.faults.test_storage_full import await_warning, fill, small_disk
from tests.image_sets import jpeg, write
from tests.running_node import RunningNode, running_node

ITEMS = 120
QUEUE = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "min_chunk_items": 8, "chunk_items": 8}
SLOW_ECHO = {"model": "echo", "engine": "echo", "max_running": 4, "options": {"delay_s": 0.1}}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of pictures in which every fourth is one that was there before."""
    then = time.time() - 60
    for number in range(ITEMS):
        path = write(tmp_path / f"{number:03}.jpg", jpeg(number - number % 4 // 3 * 3))
        os.utime(path, (then, then))
    return tmp_path


@pytest.fixture
def node(images: Path) -> Iterator[RunningNode]:
    """A node with a slow engine."""
    with running_node(models=(SLOW_ECHO,), queue=QUEUE, images={"roots": [str(images)]}) as running:
        yield running


def ask(node: RunningNode, images: Path) -> httpx.Response:
    """``POST /v1/captions`` with ``sync``."""
    body = {"model": "echo", "images": str(images), "prompt": "say it", "sync": True}
    return httpx.post(f"{node.base_url}/captions", json=body)


def started(node: RunningNode, images: Path) -> str:
    """The id of a sync that was accepted."""
    answer = ask(node, images)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def assert_whole(node: RunningNode, batch: Any) -> list[dict[str, Any]]:
    """Every name has one line; returns the lines that were asked for anew."""
    assert batch.status == "completed", batch.model_dump_json(indent=1)
    rows = results(node.sdk(), batch.output_file_id)
    assert Counter(row["custom_id"] for row in rows) == Counter(
        f"{number:03}.jpg" for number in range(ITEMS)
    )
    return [row for row in rows if "vlmq" not in row]


def test_kill_9_of_the_node_in_the_middle_of_a_sync(node: RunningNode, images: Path) -> None:
    """It goes on, still alone; duplicates cost once, and the next sync nothing."""
    sdk = node.sdk(max_retries=0)
    batch_id = started(node, images)
    wait_until_done(sdk, batch_id, 16)
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    assert_nothing_left(node)
    node.start()
    refused = ask(node, images)
    assert refused.status_code == 400
    assert batch_id in refused.json()["error"]["message"]
    ended = wait_until_ended(sdk, batch_id, 60)
    assert len(assert_whole(node, ended)) == ITEMS * 3 // 4
    again = wait_until_ended(sdk, started(node, images))
    assert assert_whole(node, again) == []
    assert again.usage.input_tokens == 0


def test_kill_9_of_batch_processes_again_and_again(node: RunningNode, images: Path) -> None:
    """Listing, chunks, finalizing: whatever dies is done by another, and nothing is lost."""
    sdk = node.sdk(max_retries=0)
    batch_id = started(node, images)
    ended = {"completed", "failed", "cancelled", "expired"}
    for _ in range(8):
        if sdk.batches.retrieve(batch_id).status in ended:
            break
        for pid in node.batch_children()[:1]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.7)
    whole = wait_until_ended(sdk, batch_id, 90)
    # Where a first line died with its process, its duplicate may have been asked about, too.
    assert ITEMS * 3 // 4 <= len(assert_whole(node, whole)) <= ITEMS
    again = wait_until_ended(sdk, started(node, images))
    assert assert_whole(node, again) == []


def test_what_was_learned_waits_for_room(images: Path) -> None:
    """The batch is finalizing until the disk has room for what the set learned."""
    with running_node(
        models=(SLOW_ECHO,),
        queue=QUEUE,
        images={"roots": [str(images)]},
        storage={"min_free_bytes": 0},
        start=False,
    ) as node:
        folder = node.settings.data_dir / "captions"
        folder.mkdir(parents=True, exist_ok=True)
        with small_disk(folder, 1):
            node.start()
            try:
                sdk = node.sdk(max_retries=0)
                ballast = fill(folder)
                batch_id = started(node, images)
                assert await_warning(sdk, batch_id).status == "finalizing"
                ballast.unlink()
                assert_whole(node, wait_until_ended(sdk, batch_id, 60))
                assert [path.suffix for path in folder.glob("*/*")] == [".sqlite"]
                again = wait_until_ended(sdk, started(node, images))
                assert assert_whole(node, again) == []
            finally:
                node.stop()
                assert_nothing_left(node)
