"""Leases: who works on what, until when, under which fencing token.

A worker that holds a lease renews it; one that stops (killed, paused, cut off) loses it, and the
reaper offers the work again under a higher token. A lease cannot stop a paused process, so every
effect carries the token and is refused if it is not the present one.

Times are the Redis server's, so the clocks of nodes need not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shared.connection import PREFIX, Connection
from shared.errors import LeaseLost
from shared.jobs import BatchSpec, StopReason
from shared.scripts import Scripts

CONTROL_LANE = "control"
"""Where batches wait to be planned or finalized."""

_WORKERS = f"{PREFIX}workers"

PLAN = "plan"
FINAL = "final"


def model_lane(model: str) -> str:
    """The lane of batches whose chunks need ``model``."""
    return f"model/{model}"


def model_of(lane: str) -> str:
    """The model of a lane that :func:`model_lane` named."""
    return lane.removeprefix("model/")


class Lease(msgspec.Struct, frozen=True):
    """One unit of a batch (``plan``, ``final`` or a chunk's number), held under a token.

    ``attempts`` is how many workers died or vanished with this unit before.
    """

    spec: BatchSpec
    unit: str
    token: int
    attempts: int
    model: str

    @property
    def batch_id(self) -> str:
        """The batch this is a part of."""
        return self.spec.id


class Leases:
    """Claim, renew and give back units of work. Every method may raise QueueUnavailable."""

    def __init__(self, client: Connection, scripts: Scripts, *, ttl_s: float) -> None:
        self._redis: Any = client
        self._scripts = scripts
        self._ttl_ms = int(ttl_s * 1000)

    def claim(self, lane: str, worker: str) -> Lease | None:
        """Take the next unit of ``lane``: owners in turn, then each owner's batches in turn."""
        found = self._scripts("claim", lane, worker, self._ttl_ms)
        if found is None:
            return None
        _, unit, token, attempts, spec, model = found
        return Lease(
            spec=msgspec.json.decode(spec, type=BatchSpec),
            unit=unit.decode(),
            token=int(token),
            attempts=int(attempts),
            model=model.decode(),
        )

    def renew(self, lease: Lease) -> StopReason | None:
        """Hold on for another TTL; says whether the batch was asked to stop meanwhile.

        Raises: LeaseLost.
        """
        answer = self._scripts("renew", lease.batch_id, lease.unit, lease.token, self._ttl_ms)
        if answer is None:
            raise LeaseLost()
        if answer == b"":
            return None
        return "cancelled" if answer == b"cancelled" else "expired"

    def release(
        self, lease: Lease, *, delay_s: float = 0, warning: str = "", counts: bool = False
    ) -> None:
        """Give the unit back unfinished; it may be claimed again after ``delay_s``.

        ``warning`` is shown with the batch until some work on it succeeds; ``counts`` adds one to
        the unit's attempts, which are capped.
        """
        self._scripts(
            "release",
            lease.batch_id,
            lease.unit,
            lease.token,
            int(delay_s * 1000),
            warning,
            int(counts),
        )

    def reap(self, dead_workers: Sequence[str] = ()) -> list[str]:
        """Take back expired leases and those of ``dead_workers``; names what was taken."""
        return [bytes(member).decode() for member in self._scripts("reap", *dead_workers)]

    def register(self, worker: str) -> None:
        """A worker process has started; see :meth:`workers`."""
        self._redis.sadd(_WORKERS, worker)

    def unregister(self, workers: Sequence[str]) -> None:
        """These worker processes are gone."""
        if workers:
            self._redis.srem(_WORKERS, *workers)

    def workers(self) -> list[str]:
        """Worker processes that have registered and not been found dead."""
        return [bytes(name).decode() for name in self._redis.smembers(_WORKERS)]

    def lanes(self) -> list[str]:
        """Lanes in which some batch waits."""
        return [bytes(name).decode() for name in self._redis.smembers(f"{PREFIX}lanes")]

    def demand(self, lane: str, *, limit: int) -> int:
        """How many units of ``lane`` could be claimed right now, counted up to ``limit``."""
        return int(self._scripts("demand", lane, limit))
