"""A disk that runs full under a working node: a clear failure, nothing lost, on it goes with room.

The disks are real small filesystems (tmpfs), which only root may mount; elsewhere these skip.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.faults.batches import (
    assert_each_answered_once,
    assert_nothing_left,
    done,
    numbered,
    submit,
    wait_until_done,
    wait_until_ended,
)
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(180)

ITEMS = 600
LIMIT_S = 60.0
MIB = 1 << 20
QUEUE = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "chunk_items": 32, "drain_s": 5}
SLOW_ECHO = {"model": "echo", "engine": "echo", "max_running": 16, "options": {"delay_s": 0.05}}


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """A filesystem of its own at ``folder``."""
    options = f"size={mib}m,mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "vlmq-test", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small filesystem here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def node_with_small(part: str, mib: int, **storage: Any) -> Iterator[RunningNode]:
    """A node that has one part of its data on a small disk; "" is all of it, Valkey's too."""
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(
            running_node(
                models=(SLOW_ECHO,),
                queue=QUEUE,
                storage={"min_free_bytes": 0, **storage},
                start=False,
            )
        )
        folder = node.settings.data_dir / part
        stack.enter_context(small_disk(folder, mib))
        if not part:  # the mount hides what was written before
            node.stores.layout.create()
            node.stores.models.link("echo", None, engine="echo", replace=True)
        node.start()
        try:
            yield node
        finally:
            node.stop()
            assert_nothing_left(node)


def fill(folder: Path) -> Path:
    """Take the last byte of a disk; delete the file to give it back."""
    ballast = folder / ".ballast"
    with open(ballast, "ab", buffering=0) as stream:
        for block in (bytes(64 * 1024), bytes(512), bytes(1)):
            with contextlib.suppress(OSError):
                while stream.write(block):
                    pass
    return ballast


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def warning(sdk: openai.OpenAI, batch_id: str) -> str | None:
    """What the batch says is in its way."""
    batch = sdk.batches.retrieve(batch_id)
    assert batch.model_extra is not None
    found: str | None = batch.model_extra["vlmq"]["warning"]
    return found


def await_warning(sdk: openai.OpenAI, batch_id: str) -> Batch:
    """Wait until the batch says that the disk is full."""
    wait_for(lambda: warning(sdk, batch_id) == "storage_full", "the warning", LIMIT_S)
    return sdk.batches.retrieve(batch_id)


def test_a_batch_waits_for_room_and_loses_nothing() -> None:
    """Shards cannot be written: it says so, keeps what is done, goes on when there is room."""
    with node_with_small("batches", 4) as node:
        sdk = node.sdk(max_retries=0)
        batch = submit(sdk, numbered(ITEMS))
        wait_until_done(sdk, batch.id, 64)
        ballast = fill(node.settings.data_dir / "batches")
        waiting = await_warning(sdk, batch.id)
        assert waiting.status == "in_progress"
        assert 64 <= done(waiting) < ITEMS
        before = names(node.settings.data_dir / "batches")
        with pytest.raises(openai.InternalServerError) as refused:
            submit(sdk, numbered(1))
        assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
        assert names(node.settings.data_dir / "batches") == before
        ballast.unlink()
        ended = wait_until_ended(sdk, batch.id, LIMIT_S)
        assert_each_answered_once(sdk, ended, ITEMS)
        assert warning(sdk, batch.id) is None
        assert sdk.batches.list().data == [ended]


def test_results_wait_for_room() -> None:
    """The output cannot be joined: the batch is finalizing until it can."""
    with node_with_small("files", 4) as node:
        sdk = node.sdk(max_retries=0)
        batch = submit(sdk, numbered(ITEMS))
        wait_until_done(sdk, batch.id, 32)
        ballast = fill(node.settings.data_dir / "files")
        assert await_warning(sdk, batch.id).status == "finalizing"
        assert {path.name for path in ballast.parent.glob("*/*.part")} == set()
        assert len(sdk.files.list().data) == 1
        ballast.unlink()
        assert_each_answered_once(sdk, wait_until_ended(sdk, batch.id, LIMIT_S), ITEMS)


def test_an_upload_without_room_is_refused_and_leaves_nothing() -> None:
    """With 507 and storage_full, wherever in the file the room ends; a smaller one fits."""
    with node_with_small("files", 3) as node:
        sdk = node.sdk(max_retries=0)
        files = node.settings.data_dir / "files"
        for size in (3 * MIB + 1, 10 * MIB):
            with pytest.raises(openai.InternalServerError) as refused:
                sdk.files.create(file=("big.jsonl", bytes(size)), purpose="batch")
            assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
            assert "free some space" in refused.value.message
            assert names(files) == []
        ballast = fill(files)
        with pytest.raises(openai.InternalServerError):
            sdk.files.create(file=("tiny.jsonl", b"x"), purpose="batch")
        assert names(files) == [ballast.name]
        ballast.unlink()
        assert sdk.files.list().data == []
        kept = sdk.files.create(file=("fits.jsonl", bytes(2 * MIB)), purpose="batch")
        assert sdk.files.content(kept.id).content == bytes(2 * MIB)


def test_a_full_disk_under_valkey_too() -> None:
    """Everything stands still, Valkey's own log as well; with room everything goes on."""
    with node_with_small("", 48) as node:
        sdk = node.sdk(max_retries=8)
        batch = submit(sdk, numbered(ITEMS))
        wait_until_done(sdk, batch.id, 64)
        ballast = fill(node.settings.data_dir)
        time.sleep(4)
        assert done(node.sdk(max_retries=8).batches.retrieve(batch.id)) < ITEMS
        with pytest.raises(openai.InternalServerError):
            node.sdk(max_retries=0).files.create(file=("x", b"x"), purpose="batch")
        ballast.unlink()
        assert_each_answered_once(sdk, wait_until_ended(sdk, batch.id, LIMIT_S), ITEMS)
        answer = sdk.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": "and chat"}]
        )
        assert answer.choices[0].message.content == "and chat"
