"""What a node uses while it works: GPUs, and processors by program."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from benchmarks.gpu.gpu_samples import sampling
from benchmarks.roles import role_of
from tests.running_node import RunningNode


class Usage(msgspec.Struct):
    """Means over a time, except the memory, which is the most. Filled in when the watch ends."""

    gpu_percent: float | None = None
    """How much of the time some kernel ran, mean of the GPUs."""
    gpu_gib: float | None = None
    watts: float | None = None
    cores: dict[str, float] = {}
    """Processors busy, by program."""


@contextmanager
def watching(node: RunningNode, gpus: Sequence[str]) -> Iterator[Usage]:
    """Watch the node and the GPUs it uses."""
    usage = Usage()
    before, began = _ticks(node), time.monotonic()
    with sampling(gpus) as samples:
        yield usage
    elapsed_s = time.monotonic() - began
    hertz = os.sysconf("SC_CLK_TCK")
    after = _ticks(node)
    usage.cores = {
        role: round((ticks - before.get(role, 0)) / hertz / elapsed_s, 2)
        for role, ticks in sorted(after.items())
    }
    if samples:
        busy, memory, watts = zip(*samples, strict=True)
        usage.gpu_percent = round(statistics.mean(busy), 1)
        usage.gpu_gib = round(max(memory) / 1024, 1)
        usage.watts = round(statistics.mean(watts))


def _ticks(node: RunningNode) -> dict[str, int]:
    """Processor time of the node so far, by program, those of its own children included."""
    assert node.process is not None
    ticks: dict[str, int] = defaultdict(int)
    for pid in [node.process.pid, *node.pids()]:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            role = role_of(pid)
        except (OSError, StopIteration):
            continue  # gone by now, or a helper of an engine's library
        ticks[role] += int(fields[11]) + int(fields[12])
    return dict(ticks)
