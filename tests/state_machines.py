"""Runs Hypothesis state machines whose steps go to a real server."""

from __future__ import annotations

import hypothesis
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run_machine(machine: type[RuleBasedStateMachine], *, examples: int) -> None:
    """Try ``machine`` with so many sequences of up to thirty steps."""
    run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            # Shrinking replays on a real server for minutes; thirty steps are read as they are.
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
