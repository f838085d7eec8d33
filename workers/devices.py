"""What a program computes on, as its environment tells it before it imports anything."""

from __future__ import annotations

import os

SPINS = "GOMP_SPINCOUNT"
SPIN_COUNT = "5000"
DECISIONS = (SPINS, "OMP_WAIT_POLICY")
"""What an operator may have decided of it in the environment."""


def environment(visible: str) -> dict[str, str]:
    """Of a program that may see these GPUs, in CUDA's words; empty: none, it has the processor."""
    found = {"CUDA_VISIBLE_DEVICES": visible}
    return found if visible else {**found, **on_processor()}


def on_processor() -> dict[str, str]:
    """Of a program that computes on the processor, perhaps beside others.

    torch does so with a team of OpenMP threads, and those that wait for the others go round in a circle
    (300,000 times with GNU's library) before they sleep. With an engine and a fine-tune on the same
    cores each team then waits for threads that the other's circling keeps from running; without any
    circling every short wait costs a sleep. So they circle for about as long as a sleep would take;
    ``make bench ARGS="--only beside"`` measures it. What the operator decided is left alone.
    """
    if any(name in os.environ for name in DECISIONS):
        return {}
    return {SPINS: SPIN_COUNT}
