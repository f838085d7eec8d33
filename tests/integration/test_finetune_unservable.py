"""A base that engines cannot load is not trained for hours first: the job says what it waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.finetunes import BASE, OWNER, create, training_node
from tests.fleets import wait_for_states
from tests.phi3_model import write_phi3

pytestmark = pytest.mark.timeout(120)
pytest.importorskip("sentencepiece", reason="needs vlmq[training]")


def test_a_base_with_phi3_waits_for_an_engine_that_runs_it(tmp_path: Path) -> None:
    """Given a node without lmdeploy, then the data is checked and nothing is trained."""
    base = write_phi3(tmp_path / "phi3_tiny")
    with training_node(
        roles=("redis", "reaper", "engines", "finetune"), base=base, trust_remote_code=True
    ) as running:
        wait_for_states(running.node, BASE, "failed")
        job = create(running.stores)
        waiting = running.wait(job.id, lambda now: now.waiting_for is not None, "the job to wait")
        assert waiting.waiting_for is not None
        assert waiting.waiting_for.startswith(f"an engine that can serve {BASE} (node ")
        assert "the language model is Phi3ForCausalLM" in waiting.waiting_for
        assert "lmdeploy" in waiting.waiting_for
        assert (waiting.state, waiting.progress.step) == ("queued", 0)
        assert waiting.data_report is not None
        running.stores.finetunes.want(OWNER, job.id, "cancel")
        running.wait_state(job.id, waiting.state.CANCELLED)
