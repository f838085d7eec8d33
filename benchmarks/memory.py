"""Peak memory of every process of a node after a small batch and after one ten times as large.

Peaks are ``VmHWM`` of ``/proc/PID/status``: the most pages a process ever held at a time. The
two nodes are fresh, so that neither inherits the other's peak. Where a role has several
processes the largest one counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from benchmarks.http_batches import BatchClient, run_to_end
from benchmarks.items import write_input
from benchmarks.nodes import echo_node, warm_up
from benchmarks.report import Figure, Target
from benchmarks.roles import role_of
from benchmarks.scale import Scale
from shared.process import parent_of
from tests.running_node import RunningNode

MIB = 1024 * 1024
_LIMIT_S = 1800.0
_GROWTH = Target("<=", 10)
_REDIS = Target("<", 16)


class Peaks(msgspec.Struct, frozen=True):
    """The most memory that a node took, in bytes."""

    by_role: dict[str, int]
    redis_used: int


def measure(scale: Scale) -> list[Figure]:
    """Compare the two sizes, role by role."""
    small, large = (_peaks(items) for items in scale.memory_items)
    few, many = scale.memory_items
    figures = []
    for role in sorted(small.by_role):
        before, after = small.by_role[role], large.by_role[role]
        figures.append(
            Figure(
                "memory",
                f"{role}, growth from {few:,} to {many:,} items",
                100 * (after / before - 1),
                "%",
                _GROWTH,
                f"{before / MIB:.1f} -> {after / MIB:.1f} MiB",
            )
        )
    return figures + redis_figures("memory", large, when=f" at {many:,} items")


def redis_figures(
    benchmark: str, peaks: Peaks, *, when: str = "", made_of: str = ""
) -> list[Figure]:
    """What Redis took of a node's memory, against its bound; ``when`` ends the figures' names."""
    sizes = {"used": peaks.redis_used, "resident": peaks.by_role["redis"]}
    return [
        Figure(benchmark, f"Redis {name}{when}", size / MIB, "MiB", _REDIS, made_of)
        for name, size in sizes.items()
    ]


def _peaks(items: int) -> Peaks:
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        echo_node() as node,
        BatchClient(node.base_url) as client,
    ):
        warm_up(client, Path(name))
        source = Path(name) / "input.jsonl"
        write_input(source, items)
        run_to_end(client, client.upload(source), _LIMIT_S)
        return peaks_of(node)


def peaks_of(node: RunningNode) -> Peaks:
    """The peaks until now."""
    return Peaks(_by_role(node), int(node.stores.redis.info("memory")["used_memory_peak"]))


def peak_of(pid: int) -> int:
    """The most memory that a process held at a time, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory of its own")


def _by_role(node: RunningNode) -> dict[str, int]:
    assert node.process is not None
    peaks: dict[str, int] = {}
    roles = {pid: role_of(pid) for pid in [node.process.pid, *node.pids()]}
    for pid, role in roles.items():
        name = f"{role} child" if roles.get(parent_of(pid)) == role else role
        peaks[name] = max(peaks.get(name, 0), peak_of(pid))
    return peaks
