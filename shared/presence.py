"""Who is alive: each node and chat consumer says so every few seconds, under keys that expire."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from shared.connection import PREFIX, Connection

NODE_TTL_S = 10.0
CONSUMER_TTL_S = 6.0
_CACHE_S = 0.5
_NODES = f"{PREFIX}nodes"

ReplicaState = Literal["starting", "ready", "failed", "restarting", "stopping", "unloaded", "lent"]


class ReplicaReport(msgspec.Struct, frozen=True):
    """One engine process. ``detail`` says why, when it failed."""

    model: str
    replica: int
    state: ReplicaState
    pid: int | None = None
    restarts: int = 0
    detail: str = ""


class GpuReport(msgspec.Struct, frozen=True):
    """One GPU of a machine. ``utilisation`` is from 0 to 1; None where the driver does not tell."""

    index: int
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation: float | None = None


class FinetuneReport(msgspec.Struct, frozen=True):
    """What a machine does for fine-tunes: GPUs they may take, those free of them, and their ids."""

    gpus_total: int
    gpus_free: int
    running: list[str] = []


class NodeReport(msgspec.Struct, frozen=True):
    """One machine. ``updated_at`` is in Unix seconds."""

    node: str
    updated_at: int
    replicas: list[ReplicaReport] = []
    programs: dict[str, str] = {}
    """Each program and its state, e.g. ``{"chat": "ready"}``."""
    obtainable: list[str] = []
    """Models without a ready replica that a request for them brings, or that are being replaced."""
    lent: dict[str, str] = {}
    """Models whose engines had to leave for fine-tunes, with the reason for people."""
    gpus: list[GpuReport] = []
    """All GPUs that the driver knows, whoever uses them."""
    finetune: FinetuneReport | None = None
    """None where fine-tunes do not run."""


class Presence:
    """Announce and look up. Every method may raise QueueUnavailable."""

    def __init__(self, client: Connection) -> None:
        self._redis: Any = client
        self._nodes: list[NodeReport] = []
        self._read_at = float("-inf")

    def announce(self, report: NodeReport, ttl_s: float = NODE_TTL_S) -> None:
        """Say what this node runs; forgotten after ``ttl_s`` unless said again."""
        pipeline = self._redis.pipeline()
        pipeline.set(_node_key(report.node), msgspec.json.encode(report), px=int(ttl_s * 1000))
        pipeline.sadd(_NODES, report.node)
        pipeline.execute()

    def forget(self, node: str) -> None:
        """The node stopped in good order."""
        pipeline = self._redis.pipeline()
        pipeline.delete(_node_key(node))
        pipeline.srem(_NODES, node)
        pipeline.execute()

    def nodes(self) -> list[NodeReport]:
        """All nodes alive, by name."""
        names = sorted(bytes(name).decode() for name in self._redis.smembers(_NODES))
        if not names:
            return []
        rows = self._redis.mget([_node_key(name) for name in names])
        return [msgspec.json.decode(row, type=NodeReport) for row in rows if row is not None]

    def serving(self, model: str) -> bool:
        """Whether some replica of ``model`` is ready. May be half a second old."""
        return any(
            replica.model == model and replica.state == "ready"
            for node in self._recent()
            for replica in node.replicas
        )

    def obtainable(self, model: str) -> bool:
        """Whether a request for ``model`` can be answered, perhaps after it was loaded. As old."""
        return self.serving(model) or any(model in node.obtainable for node in self._recent())

    def lent(self, model: str) -> str | None:
        """Why no engine of ``model`` is to be had for a while, if one would be otherwise. As old."""
        return next((node.lent[model] for node in self._recent() if model in node.lent), None)

    def refusal(self, model: str) -> str | None:
        """Why no engine of ``model`` is to be had, where every one that was tried has failed. As old.

        Also of a model that a request may bring all the same, because it will be tried again.
        """
        found = [
            (node.node, replica)
            for node in self._recent()
            for replica in node.replicas
            if replica.model == model
        ]
        if not found or any(replica.state != "failed" for _, replica in found):
            return None
        node, replica = found[0]
        return f"node {node} says: {replica.detail}"

    def _recent(self) -> list[NodeReport]:
        if time.monotonic() - self._read_at > _CACHE_S:
            self._nodes = self.nodes()
            self._read_at = time.monotonic()
        return self._nodes

    def consumer_beat(self, consumer: str) -> None:
        """A chat consumer is alive."""
        self._redis.set(f"{PREFIX}consumer:{consumer}", b"1", px=int(CONSUMER_TTL_S * 1000))

    def consumer_alive(self, consumer: str) -> bool:
        """Whether a chat consumer was heard of lately."""
        return bool(self._redis.exists(f"{PREFIX}consumer:{consumer}"))


def _node_key(name: str) -> str:
    return f"{PREFIX}node:{name}"
