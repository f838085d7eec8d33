"""A fine-tune meets each kind of night: a part of what runs it is killed, paused or cut off.

The trainer is a stand-in with the real one's files, signals and exit statuses; the real one goes
through the same in tests/integration/test_finetune_real.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.finetunes import FinetuneState
from tests.finetunes import OWNER, Running, create, training_node

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One node for the tests that leave it whole."""
    with training_node() as found:
        yield found


def test_a_job_is_looked_at_and_trained(running: Running) -> None:
    """Given a job, then its data is checked, its recipe shown, and it is trained and converted."""
    job = create(running.stores)
    done = running.wait(job.id, lambda now: now.stage == "compare", "the comparison")
    assert (done.state, done.data_report["train"], done.resolved["total_steps"]) == (
        FinetuneState.RUNNING,
        22,
        60,
    )
    assert [one.step for one in done.checkpoints] == [40, 50, 60]
    assert list(running.losses(job.id))[-1] == 60
    assert running.processes(job.id) == []
    running.stores.finetunes.want(OWNER, job.id, "cancel")
    running.wait_state(job.id, FinetuneState.CANCELLED)
