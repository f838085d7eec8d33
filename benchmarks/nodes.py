"""The nodes that are measured: whole ones, as ``vlmq up`` starts them, with the echo engine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.http_batches import BatchClient, run_to_end
from benchmarks.items import MODEL, write_input
from tests.running_node import RunningNode, running_node

MAX_RUNNING = 256
_WARM_UP_ITEMS = 2_000
_WARM_UP_LIMIT_S = 120.0


def echo_node(**options: float) -> AbstractContextManager[RunningNode]:
    """A fresh node with default settings; ``options`` are the echo engine's (delays, seconds)."""
    serve = {"model": MODEL, "engine": "echo", "max_running": MAX_RUNNING, "options": options}
    return running_node(models=(serve,))


def image_node(
    roots: Path, tile_px: int, **sections: dict[str, Any]
) -> AbstractContextManager[RunningNode]:
    """A fresh node that reads images below ``roots`` and cuts each into one tile of so many pixels."""
    options = {"tiling": {"tile_px": tile_px}}
    serve = {"model": MODEL, "engine": "echo", "max_running": MAX_RUNNING, "options": options}
    return running_node(models=(serve,), images={"roots": [str(roots)]}, **sections)


def warm_up(client: BatchClient, folder: Path) -> None:
    """Run a small batch, so that every process has started and imported what it needs."""
    source = folder / "warm-up.jsonl"
    write_input(source, _WARM_UP_ITEMS)
    run_to_end(client, client.upload(source), _WARM_UP_LIMIT_S)
