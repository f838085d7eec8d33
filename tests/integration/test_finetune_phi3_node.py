"""A base with Phi-3 on a node: trained only where an engine can serve it, and then all the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.finetunes import FinetuneState
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
        assert (waiting.state, waiting.progress.step) == (FinetuneState.QUEUED, 0)
        assert waiting.data_report is not None
        running.stores.finetunes.want(OWNER, job.id, "cancel")
        running.wait_state(job.id, FinetuneState.CANCELLED)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_such_an_engine_it_is_trained_and_registered(tmp_path: Path) -> None:
    """The whole way with the real trainer; the engine repeats what it is asked, whatever the model."""
    base = write_phi3(tmp_path / "phi3_tiny")
    with training_node(
        roles=("redis", "reaper", "batch", "engines", "finetune"),
        models=({"model": BASE, "engine": "echo"},),
        base=base,
        trust_remote_code=True,
        real=True,
    ) as running:
        job = create(running.stores, n_epochs=1, save_every=5)
        done = running.wait_state(job.id, FinetuneState.SUCCEEDED, limit_s=480)
        losses = list(running.losses(job.id).values())
        assert losses[-1] < losses[0]
        record = running.stores.models.get(done.fine_tuned_model or "")
        assert record.path is not None
        names = {path.name for path in base.iterdir()}
        assert {path.name for path in Path(record.path).iterdir()} == names
        assert done.data_report is not None
        assert not done.data_report["exact_tokens"]
