"""What a node uses while it works: GPUs, and processors by program."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from benchmarks.roles import role_of
from tests.running_node import RunningNode

_INTERVAL_S = 0.5
_QUERY = "utilization.gpu,memory.used,power.draw"


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
    with _sampling(gpus) as samples:
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


def gpu_names() -> list[str]:
    """The GPUs that nvidia-smi lists; none without it."""
    try:
        listed = _ask("--query-gpu=name")
    except OSError:
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


Sample = tuple[float, float, float]
"""Percent busy, MiB used, watts."""


@contextmanager
def _sampling(gpus: Sequence[str]) -> Iterator[list[Sample]]:
    """Read the GPUs by and by, in a thread; the samples are complete at the end."""
    samples: list[Sample] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_INTERVAL_S):
            samples.extend(_read(gpus))

    thread = threading.Thread(target=sample, name="gpu-samples", daemon=True)
    if gpus:
        thread.start()
    try:
        yield samples
    finally:
        stop.set()
        if gpus:
            thread.join()


def _read(gpus: Sequence[str]) -> list[Sample]:
    answer = _ask(f"--query-gpu={_QUERY}", f"--id={','.join(gpus)}")
    rows = [line.split(",") for line in answer.splitlines() if line.count(",") == 2]
    return [(_number(busy), _number(memory), _number(watts)) for busy, memory, watts in rows]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return 0.0  # "[N/A]": this driver does not tell


def _ask(*query: str) -> str:
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout if answer.returncode == 0 else ""


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
