"""Programs that compute on one processor: a training alone and two at once.

The alternative is torch as it comes. On one core there is nothing to see: torch then has one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.report import Figure, Target
from benchmarks.scale import Scale
from workers import devices

_ALONE = Target("<=", 1.15)
_AT_ONCE = Target(">=", 2)


def measure(scale: Scale) -> list[Figure]:
    """Each way alone and beside a program of its own kind, in turn."""
    clean = {name: value for name, value in os.environ.items() if name not in devices.DECISIONS}
    ours = {**clean, devices.SPINS: devices.SPIN_COUNT}
    found = {
        f"{way}, {words}": _step_ms(environment, count, scale.training_s)
        for count, words in ((1, "alone"), (2, "two at once"))
        for way, environment in (("torch as it comes", clean), ("as nodes start it", ours))
    }
    theirs, own = found["torch as it comes, alone"], found["as nodes start it, alone"]
    slow, quick = found["torch as it comes, two at once"], found["as nodes start it, two at once"]
    return [
        *(Figure("beside", f"step: {name}", value, "ms") for name, value in found.items()),
        Figure("beside", "alone: nodes / torch", own / theirs, "x", _ALONE, "the steps above"),
        Figure("beside", "two: torch / nodes", slow / quick, "x", _AT_ONCE, "the steps above"),
    ]


def _step_ms(environment: dict[str, str], count: int, seconds: float) -> float:
    """The slowest of so many programs that train at once."""
    command = [sys.executable, "-m", "benchmarks.training_steps", str(seconds)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    told = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return max(float(text) for text in told)
