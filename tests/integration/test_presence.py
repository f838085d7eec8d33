"""What nodes say about engines, and what follows from all of them together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shared.clock import unix_now
from shared.presence import NodeReport, ReplicaReport, ReplicaState
from shared.stores import Stores


@pytest.mark.parametrize(
    ("states", "refused"),
    [
        ((("failed",),), True),
        ((("failed", "failed"), ("failed",)), True),
        ((("failed",), ()), True),
        ((), False),
        (((),), False),
        ((("failed",), ("starting",)), False),
        ((("failed", "ready"),), False),
        ((("lent",),), False),
        ((("unloaded",),), False),
        ((("restarting",),), False),
    ],
)
def test_a_model_is_refused_where_every_engine_that_was_tried_has_failed(
    own_stores: Stores, states: Sequence[Sequence[ReplicaState]], refused: bool
) -> None:
    """Each inner tuple is a node. Where nobody has tried, or somebody still does, nothing is known."""
    for number, found in enumerate(states):
        replicas = [
            ReplicaReport("m", index, state, detail="it is too large")
            for index, state in enumerate(found)
        ]
        other = ReplicaReport("another", 0, "failed")
        report = NodeReport(f"n{number}", unix_now(), [*replicas, other], obtainable=["m"])
        own_stores.presence.announce(report, ttl_s=60)
    words = own_stores.presence.refusal("m")
    assert words == ("node n0 says: it is too large" if refused else None)
