"""The real trainer on a whole node: killed in the middle, it ends as a model that answers."""

from __future__ import annotations

import json

import pytest

from shared.finetunes import FinetuneState
from shared.tunable import TRAINED_SYSTEM
from tests.faults.batches import assert_nothing_left
from tests.finetunes import OWNER, create, training_node
from tests.running_node import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROLES = ("redis", "reaper", "batch", "engines", "finetune")
STEPS = 30
START_UP_S = 240.0


def test_a_killed_trainer_still_ends_as_a_model_that_answers() -> None:
    """Given kill -9 of xtuner after its first checkpoints, then it goes on, and is registered."""
    with training_node(roles=ROLES, real=True) as running:
        job = create(running.stores, n_epochs=5, save_every=5, learning_rate=1e-4)
        running.wait(job.id, lambda now: len(now.checkpoints) >= 2, "two checkpoints", START_UP_S)
        running.kill(running.trainer_pid(job.id))
        done = running.wait_state(job.id, FinetuneState.SUCCEEDED, limit_s=2 * START_UP_S)

        losses = running.losses(job.id)
        assert list(losses)[-1] == STEPS
        assert all(loss is not None for loss in losses.values())
        assert "goes on from step" in running.messages(job.id)
        assert running.processes(job.id) == []

        record = running.stores.models.get(done.fine_tuned_model or "")
        assert (record.base, record.job, record.candidate) == ("tiny", job.id, False)
        assert record.defaults.system == TRAINED_SYSTEM["InternLM2ForCausalLM"]
        folder = running.stores.finetunes.path(job.id)
        compared = (folder / "comparison.jsonl").read_text().splitlines()
        assert {row["tuned"] is not None for row in map(json.loads, compared)} == {True}
        names = [running.stores.files.get(OWNER, file_id).filename for file_id in done.result_files]
        assert names == [f"{job.id}_comparison.jsonl", f"{job.id}_metrics.json"]

        origin = json.loads((folder / "provenance.json").read_text())
        assert len(origin["attempts"]) == 2
        assert origin["attempts"][1]["resumed_from_step"] > 0
        assert (origin["final_step"], origin["seed"]) == (STEPS, 7)
        assert {"xtuner", "torch", "deepspeed"} <= origin["attempts"][0]["versions"].keys()

        asked = running.stores.finetunes.request_checkpoint(OWNER, job.id, 25)
        assert asked.conversion == "requested"
        wait_for(
            lambda: any(one.model for one in running.get(job.id).checkpoints),
            "the checkpoint's model",
            START_UP_S,
            lambda: running.explain(job.id),
        )
        assert running.stores.models.knows(f"{done.fine_tuned_model}:ckpt-step-25", OWNER)
        running.node.stop()
        assert_nothing_left(running.node)
