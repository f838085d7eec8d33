"""Fine-tunes and what they share with others: GPUs with engines, the disk with everything.

The trainer is the stand-in of tests/stand_in_trainer.py, the engines only pretend to need a GPU.
"""

from __future__ import annotations

import os
import re
import time

import pytest

from shared.finetunes import FinetuneState
from tests.faults.batches import assert_nothing_left
from tests.faults.test_storage_full import fill, small_disk
from tests.finetunes import OWNER, QUEUE, Running, create, start, training_node
from tests.fleets import QUICK, echo, wait_for_states
from tests.running_node import wait_for

pytestmark = pytest.mark.timeout(240)
ENGINES = ("redis", "reaper", "engines", "batch", "finetune")


def test_engines_leave_a_gpu_for_training_and_come_back() -> None:
    """Given one GPU for both, then it is one's or the other's, and two jobs take turns."""
    with training_node(
        roles=ENGINES,
        models=(echo("echo"),),
        node=QUICK,
        finetune={"gpus": ["0"], "max_jobs": 2},
    ) as running:
        wait_for_states(running.node, "echo", "ready")
        jobs = [create(running.stores) for _ in range(2)]
        first = next_in_training(running, [job.id for job in jobs])
        [other] = [job.id for job in jobs if job.id != first]
        wait_for_states(running.node, "echo", "lent")
        assert running.node.engine_pids() == []
        running.wait(
            other,
            lambda now: now.waiting_for == f"1 GPU: GPU 0 is used by {first}",
            "the other to say what it waits for",
        )
        [report] = [node.finetune for node in running.stores.presence.nodes()]
        assert report is not None
        assert (report.gpus_total, report.gpus_free, first in report.running) == (1, 0, True)
        for job in (first, other):
            running.wait(job, lambda now: now.stage == "compare", "the comparison")
            running.stores.finetunes.want(OWNER, job, "cancel")
        wait_for_states(running.node, "echo", "ready")
        assert "on GPU 0" in running.messages(other)


def next_in_training(running: Running, jobs: list[str]) -> str:
    """The first of these jobs that gets anywhere."""
    found: list[str] = []

    def seen() -> bool:
        found[:] = [job for job in jobs if running.get(job).progress.step > 0]
        return bool(found)

    wait_for(seen, "one to train", 60, lambda: running.explain(jobs[0]))
    assert len(found) == 1
    return found[0]


def test_a_job_for_more_gpus_than_there_are_waits_and_others_do_not() -> None:
    """Given a job for two GPUs on a machine with one, then a later job for one is trained."""
    with training_node(finetune={"gpus": ["0"]}) as running:
        large = create(running.stores, gpus=2, batch_size=4)
        running.wait_state(large.id, FinetuneState.QUEUED)
        small = create(running.stores)
        running.wait(small.id, lambda now: now.stage == "compare", "the comparison")
        assert running.get(large.id).state is FinetuneState.QUEUED


@pytest.mark.parametrize("left_bytes", [3 << 20, 0])
def test_a_disk_that_fills_up_loses_no_checkpoint(left_bytes: int) -> None:
    """Given no room for a checkpoint, or for anything, then the job waits and goes on with room."""
    with training_node(started=False, storage={"min_free_bytes": 1 << 20}) as running:
        folder = running.node.settings.data_dir / "finetunes"
        with small_disk(folder, 60):
            start(running)
            job = create(running.stores, n_epochs=15)
            running.wait_step(job.id, 25)
            ballast = fill(folder)
            os.truncate(ballast, ballast.stat().st_size - left_bytes)
            wait_for(lambda: running.processes(job.id) == [], "the trainer to end", 30)
            if left_bytes:
                waiting = running.wait(
                    job.id, lambda now: "disk" in (now.waiting_for or ""), "the job to wait"
                )
                assert waiting.state is FinetuneState.QUEUED
            time.sleep(QUEUE["lease_ttl_s"] + 1)
            ballast.unlink()
            running.wait(job.id, lambda now: now.stage == "compare", "the comparison", 90)
            assert "Training waits for disk space" in running.messages(job.id)
            steps = re.findall(r"goes on from step (\d+) of", running.messages(job.id))
            assert [int(step) >= 20 for step in steps] == [True]
            assert list(running.losses(job.id)) == list(range(1, 91))
            assert "Its worker" not in running.messages(job.id)
            running.node.stop()
            assert_nothing_left(running.node)


def test_a_disk_that_cannot_hold_the_checkpoints_is_told_before_training() -> None:
    """Given too little room from the start, then the job fails with the numbers."""
    with (
        training_node(started=False, storage={"min_free_bytes": 0}) as running,
        small_disk(running.node.settings.data_dir / "finetunes", 20),
    ):
        start(running)
        failed = running.wait_state(create(running.stores).id, FinetuneState.FAILED)
        assert failed.error is not None
        assert failed.error.code == "not_enough_disk"
        assert "need 32 MiB" in failed.error.message
        assert failed.started_at is None
        running.node.stop()
        assert_nothing_left(running.node)


def test_a_comparison_that_nobody_serves_pauses_the_job() -> None:
    """Given no engines, then what was trained is kept, and the job goes on when it is resumed."""
    with training_node(
        roles=("redis", "reaper", "batch", "finetune"), finetune={"compare_wait_s": 2}
    ) as running:
        job = create(running.stores)
        paused = running.wait_state(job.id, FinetuneState.PAUSED)
        assert paused.stage == "compare"
        assert "no running node serves tiny" in running.messages(job.id)
        running.stores.finetunes.want(OWNER, job.id, "run")
        running.wait_state(job.id, FinetuneState.RUNNING)
        running.wait_state(job.id, FinetuneState.PAUSED)
        assert running.messages(job.id).count("Training begins") == 1
