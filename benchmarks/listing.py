"""Ten million entries of an image set by their manifest alone: no image is opened, no engine runs.

A list of paths is listed by processes that run no chunks (:mod:`benchmarks.lister`), in a node with
api, Valkey and reaper. One lister is killed with ``kill -9`` in the middle; the next goes on behind
what was published. All is counted, entry by entry. Then the batch is cancelled, by which every entry
gets a line that says so, and is resumed as the batch of those lines, which is counted in turn.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.http_batches import BatchClient
from benchmarks.image_sets import PROMPT
from benchmarks.items import MODEL
from benchmarks.memory import MIB, Peaks, peak_of, peaks_of, redis_figures
from benchmarks.pictures import name_of, number_of
from benchmarks.report import Figure, Target
from benchmarks.scale import Scale
from shared.captions import decode_entry
from shared.connection import PREFIX
from shared.leases import FINAL, PLAN
from shared.manifest import Manifest
from tests.running_node import START_LIMIT_S, RunningNode, running_node, wait_for

_ROLES = ["api", "redis", "reaper"]
_LIMIT_S = 3600.0
_POLL_S = 0.1
_BUFFER_BYTES = 1 << 20


class _Story(msgspec.Struct, frozen=True):
    """What happened. Times are in seconds, memory in bytes.

    ``killed_at`` entries were published when the first lister was killed, after ``before_kill_s``; the
    second took ``after_kill_s``, ``reclaimed_s`` after the kill. ``resumed_s`` is the listing of what was
    cancelled.
    """

    killed_at: int
    before_kill_s: float
    reclaimed_s: float
    after_kill_s: float
    cancelled_s: float
    resumed_s: float
    lister_before: int
    lister_after: int
    peaks: Peaks


def measure(scale: Scale) -> list[Figure]:
    """List, kill, go on, count, cancel, count."""
    entries = scale.entries
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        running_node(
            models=(), start=False, images={"roots": [name]}, node={"roles": _ROLES}
        ) as node,
        BatchClient(node.base_url) as client,
    ):
        node.stores.models.link(MODEL, None, engine="echo", trust_remote_code=False)
        node.launch()
        wait_for(lambda: _serves(node), "the api to answer", START_LIMIT_S, node.story)
        paths = Path(name) / "pictures.txt"
        _write_list(paths, entries)
        story = _run(node, client, paths, entries)
    return _figures(story, entries)


def _run(node: RunningNode, client: BatchClient, paths: Path, entries: int) -> _Story:
    batch_id = client.caption(paths, MODEL, PROMPT)
    start = time.perf_counter()
    with _lister(node, PLAN) as first:
        killed_at = _listed(client, batch_id, first, entries // 2)
        lister_before = peak_of(first.pid)
        first.kill()
    before_kill_s = time.perf_counter() - start
    assert killed_at < entries, "all was listed before the lister could be killed"
    plan = f"{batch_id}|{PLAN}"
    wait_for(lambda: not node.stores.redis.zscore(f"{PREFIX}leases", plan), "the lease's end", 60)
    reclaimed_s = time.perf_counter() - start - before_kill_s
    start = time.perf_counter()
    lister_after = _done(_lister(node, PLAN))
    after_kill_s = time.perf_counter() - start
    _check_manifest(node.stores.batches.folder(batch_id), entries)
    _check_counts(client.batch(batch_id), "in_progress", entries)
    start = time.perf_counter()
    client.cancel(batch_id)
    _done(_lister(node, FINAL))
    batch = client.wait(batch_id, _LIMIT_S)
    cancelled_s = time.perf_counter() - start
    _check_counts(batch, "cancelled", entries, failed=entries)
    start = time.perf_counter()
    resumed_id = client.retry(batch_id)
    _done(_lister(node, PLAN))
    resumed_s = time.perf_counter() - start
    _check_manifest(node.stores.batches.folder(resumed_id), entries)
    _check_counts(client.batch(resumed_id), "in_progress", entries)
    return _Story(
        killed_at,
        before_kill_s,
        reclaimed_s,
        after_kill_s,
        cancelled_s,
        resumed_s,
        lister_before,
        lister_after,
        peaks_of(node),
    )


def _figures(story: _Story, entries: int) -> list[Figure]:
    first = story.killed_at / story.before_kill_s
    second = (entries - story.killed_at) / story.after_kill_s
    growth = 100 * (story.lister_after / story.lister_before - 1)
    found = [
        ("entries listed, each once and in order", entries, "", None, "counted in the manifest"),
        ("until kill -9", first, "entries/s", None, f"{story.killed_at:,} entries published"),
        ("lease taken back after", story.reclaimed_s, "s", None, ""),
        ("by the next lister", second, "entries/s", None, "with noting the names before"),
        ("cancelled", entries / story.cancelled_s, "entries/s", None, "a line for each"),
        ("resumed", entries / story.resumed_s, "entries/s", None, "counted in its manifest, too"),
        (
            "peak memory of the lister, growth of the second",
            growth,
            "%",
            Target("<=", 10),
            f"{story.lister_before / MIB:.1f} -> {story.lister_after / MIB:.1f} MiB",
        ),
    ]
    return [
        *(Figure("listing", *row) for row in found),
        *redis_figures("listing", story.peaks),
    ]


def _serves(node: RunningNode) -> bool:
    try:
        return httpx.get(f"{node.base_url}/models", timeout=5).is_success
    except httpx.TransportError:
        return False


def _write_list(path: Path, entries: int) -> None:
    """A path a line; nothing is there."""
    with open(path, "w", buffering=_BUFFER_BYTES) as stream:
        stream.writelines(f"{path.parent}/{name_of(number)}\n" for number in range(entries))


def _lister(node: RunningNode, unit: str) -> subprocess.Popen[str]:
    config = node.settings.run_dir / "settings.json"  # what the node gives its own programs
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.lister", str(config), unit],
        stdout=subprocess.PIPE,
        text=True,
    )


def _listed(client: BatchClient, batch_id: str, lister: subprocess.Popen[str], entries: int) -> int:
    """Wait until so many entries are published; returns how many are."""
    while (total := int(client.batch(batch_id)["request_counts"]["total"])) < entries:
        assert lister.poll() is None, "the lister ended"
        time.sleep(_POLL_S)
    return total


def _done(lister: subprocess.Popen[str]) -> int:
    """Wait for a lister's end; returns the most memory that it took."""
    with lister:
        printed, _ = lister.communicate(timeout=_LIMIT_S)
    assert lister.returncode == 0, f"the lister ended with {lister.returncode}"
    return int(printed.splitlines()[-1])


def _check_manifest(folder: Path, entries: int) -> None:
    """Raise AssertionError unless every entry is there once, in order."""
    manifest, expected = Manifest(folder), 0
    for chunk in manifest.chunks():
        with open(manifest.entries(chunk.index), "rb") as stream:
            stream.seek(chunk.offset)
            for line in stream.read(chunk.length).splitlines():
                number = number_of(decode_entry(line).name)
                assert number == expected, f"entry {number} in place of {expected}"
                expected += 1
    assert expected == entries, f"{expected} entries in place of {entries}"


def _check_counts(batch: dict[str, Any], status: str, entries: int, *, failed: int = 0) -> None:
    assert batch["status"] == status, f"the batch is {batch['status']}"
    counts = {"total": entries, "completed": 0, "failed": failed}
    assert batch["request_counts"] == counts, f"{batch['request_counts']} in place of {counts}"
    assert batch["vlmq"]["listing"] == {"complete": True, "images": entries}
