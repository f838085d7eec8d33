"""What is true of the whole system now, read from Redis in four round trips whatever waits there.

Queues are not walked: the scripts keep how many units each lane has waiting and held, and which of
its batches is the oldest (``recount`` in ``lua/lib.lua``). The work grows with models and nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shared.connection import PREFIX, Connection
from shared.leases import CONTROL_LANE, model_lane
from shared.metrics import BATCHES, CHATS, FINETUNES, KEY, counted
from shared.presence import NodeReport, Presence
from shared.queue import Tickets, chat_queue


class LaneGauges(msgspec.Struct, frozen=True):
    """One lane: units waiting and held; ages in seconds, 0 when nothing waits."""

    waiting: int
    held: int
    oldest_age_s: float
    longest_wait_s: float


class Gauges(msgspec.Struct, frozen=True):
    """One look at everything. ``counters`` are the fields of the hash of counters."""

    counters: dict[str, int]
    nodes: list[NodeReport]
    control: LaneGauges
    lanes: dict[str, LaneGauges]
    """By model."""
    chats_waiting: dict[str, int]
    """By model."""
    chats_open: int
    leases_held: int
    batches: dict[str, int]
    """By state."""
    finetunes: dict[str, int]
    """By state."""
    finetune_step_s: dict[str, float]
    """Of what trains now, by base model; the longest if several do."""


class GaugeReader:
    """Reads :class:`Gauges`."""

    def __init__(self, client: Connection, presence: Presence, tickets: Tickets) -> None:
        self._redis: Any = client
        self._presence = presence
        self._tickets = tickets

    def read(self) -> Gauges:
        """Look now. Raises: QueueUnavailable."""
        nodes = self._presence.nodes()
        states, tuning = BATCHES.known["state"], FINETUNES.known["state"]
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        pipeline.hgetall(KEY)
        pipeline.hgetall(f"{PREFIX}waiting")
        pipeline.hgetall(f"{PREFIX}held")
        pipeline.zcard(f"{PREFIX}leases")
        for state in states:
            pipeline.scard(f"{PREFIX}state:{state}")
        for state in tuning:
            pipeline.scard(f"{PREFIX}finetune_state:{state}")
        pipeline.hvals(f"{PREFIX}finetune_steps")
        (seconds, micros), counters, waiting, held, leases, *sizes, steps = pipeline.execute()
        now_s = seconds + micros / 1_000_000
        numbers = _numbers(counters)
        models = _models(nodes, _numbers(waiting), numbers)
        lanes, chats, chats_open = self._lanes(models, now_s, _numbers(waiting), _numbers(held))
        return Gauges(
            counters=numbers,
            nodes=nodes,
            control=lanes.pop(CONTROL_LANE),
            lanes={model: lanes[model_lane(model)] for model in models},
            chats_waiting=chats,
            chats_open=chats_open,
            leases_held=leases,
            batches=dict(zip(states, sizes[: len(states)], strict=True)),
            finetunes=dict(zip(tuning, sizes[len(states) :], strict=True)),
            finetune_step_s=_longest(steps),
        )

    def _lanes(
        self, models: Sequence[str], now_s: float, waiting: dict[str, int], held: dict[str, int]
    ) -> tuple[dict[str, LaneGauges], dict[str, int], int]:
        names = [CONTROL_LANE, *(model_lane(model) for model in models)]
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.zrange(f"{PREFIX}created:{name}", 0, 0, withscores=True)
            pipeline.zrange(f"{PREFIX}touched:{name}", 0, 0, withscores=True)
        for model in models:
            pipeline.llen(self._tickets.key(chat_queue(model)))
        pipeline.zcount(f"{PREFIX}chats", now_s, "+inf")
        rows = pipeline.execute()
        firsts = rows[: 2 * len(names)]
        lanes = {
            name: LaneGauges(
                waiting=waiting.get(name, 0),
                held=held.get(name, 0),
                oldest_age_s=_age(created, now_s),
                longest_wait_s=_age(touched, now_s),
            )
            for name, created, touched in zip(names, firsts[::2], firsts[1::2], strict=True)
        }
        return lanes, dict(zip(models, rows[2 * len(names) : -1], strict=True)), rows[-1]


def _models(
    nodes: Sequence[NodeReport], waiting: dict[str, int], counters: dict[str, int]
) -> list[str]:
    """Models that are served, have batches, or were asked in chat."""
    served = {replica.model for node in nodes for replica in node.replicas}
    queued = {lane.removeprefix("model/") for lane in waiting if lane != CONTROL_LANE}
    return sorted(served | queued | {model for model, _ in counted(counters, CHATS)})


def _longest(steps: Sequence[bytes]) -> dict[str, float]:
    """The longest step by model; each row is a model and seconds."""
    rows = [msgspec.json.decode(row, type=tuple[str, float]) for row in steps]
    return dict(sorted(rows))  # the last of a model is its longest


def _numbers(fields: dict[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in fields.items()}


def _age(first: Sequence[tuple[bytes, float]], now_s: float) -> float:
    """Since when, in seconds; the clocks of two machines may make it less than nothing."""
    return max(0.0, now_s - first[0][1] / 1000) if first else 0.0
