"""What a program computes on, as its environment tells it before it imports anything."""

from __future__ import annotations

import os


def environment(visible: str) -> dict[str, str]:
    """Of a program that may see these GPUs, in CUDA's words; empty: none, it has the processor."""
    found = {"CUDA_VISIBLE_DEVICES": visible}
    return found if visible else {**found, **on_processor()}


def on_processor() -> dict[str, str]:
    """Of a program that computes on the processor, perhaps beside others.

    torch does so with a team of OpenMP threads, and those that wait for the others keep a core busy by
    themselves. With an engine and a fine-tune on the same cores each team then waits for threads that
    the other's waiting keeps from running. An ``OMP_WAIT_POLICY`` of this process is passed on.
    """
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
