"""The nodes that are measured: whole ones, as ``vlmq up`` starts them, with the echo engine."""

from __future__ import annotations

from contextlib import AbstractContextManager

from benchmarks.items import MODEL
from tests.running_node import RunningNode, running_node

MAX_RUNNING = 256


def echo_node(**options: float) -> AbstractContextManager[RunningNode]:
    """A fresh node with default settings; ``options`` are the echo engine's (delays, seconds)."""
    serve = {"model": MODEL, "engine": "echo", "max_running": MAX_RUNNING, "options": options}
    return running_node(models=(serve,))
