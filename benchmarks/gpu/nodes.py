"""The nodes that are measured on GPUs: whole ones, as ``vlmq up`` starts them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.setups import Sections
from shared.errors import QueueUnavailable
from shared.presence import ReplicaReport
from tests.running_node import RunningNode, running_node

_POLL_S = 0.2
_MOST_DEATHS = 2
"""An engine that died so often while it loaded will not be ready."""


class EnginesFailed(AssertionError):
    """An engine did not become ready."""


@contextmanager
def prepared_node(
    sections: Sections, checkpoint: Path | None, roots: list[Path]
) -> Iterator[RunningNode]:
    """A node that is configured and linked to the checkpoint, but not started."""
    settings = dict(sections)
    serve = settings.pop("serve")
    settings["images"] = {"roots": [str(root) for root in roots], **settings.get("images", {})}
    with running_node(
        models=(serve,),
        checkpoints={} if checkpoint is None else {serve["model"]: checkpoint},
        trust_remote_code=True,
        start=False,
        **settings,
    ) as node:
        yield node


def start(node: RunningNode, limit_s: float) -> float:
    """Start a node and return the seconds until every replica was ready.

    Raises: EnginesFailed with the reason that the node gives, or that it took too long.
    """
    began = time.monotonic()
    node.launch()
    while not (node.is_up() and _all_ready(node)):
        _fail_if_given_up(node)
        if time.monotonic() - began > limit_s:
            raise EnginesFailed(f"no engine after {limit_s:.0f} s:\n{node.story()}")
        time.sleep(_POLL_S)
    return time.monotonic() - began


def replicas(node: RunningNode) -> list[ReplicaReport]:
    """What the node says of its engines; nothing while its Redis is not up."""
    return [replica for report in node.stores.presence.nodes() for replica in report.replicas]


def _all_ready(node: RunningNode) -> bool:
    wanted = sum(serve.replicas for serve in node.settings.node.serve)
    return sum(replica.state == "ready" for replica in replicas(node)) == wanted


def _fail_if_given_up(node: RunningNode) -> None:
    try:
        found = replicas(node)
    except QueueUnavailable:
        return  # its Redis is still starting; the limit of time holds
    for replica in found:
        if replica.state == "failed" or replica.restarts >= _MOST_DEATHS:
            raise EnginesFailed(f"{replica.state}: {replica.detail}\n{node.story()}")
