"""A fine-tune meets each kind of night: a part of what runs it is killed, paused or cut off.

The trainer is a stand-in with the real one's files, signals and exit statuses; the real one goes
through some of the same in test_finetune_real.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shared.finetunes import Finetune, FinetuneState
from tests.faults.batches import assert_nothing_left
from tests.finetunes import LIMIT_S, OWNER, QUEUE, Running, create, start, training_node
from tests.running_node import wait_for
from tests.stand_in_trainer import set_faults
from workers import redis_server

pytestmark = pytest.mark.timeout(180)

LONG = {"n_epochs": 25}
STEPS = 150
LONGER = {"n_epochs": 75}
"""Some eight and twenty-five seconds of the stand-in: so that there is a middle to break."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One node for the tests that leave it whole."""
    with training_node(finetune={"max_jobs": 2, "max_attempts": 3}) as found:
        yield found


@pytest.fixture
def own() -> Iterator[Running]:
    """A node of its own, for tests that kill its programs."""
    with training_node() as found:
        yield found
        found.node.stop()
        assert_nothing_left(found.node)


def finished(running: Running, job: Finetune, steps: int) -> Finetune:
    """Wait until it is trained, see that every step was told of once and in order, and cancel it."""
    done = running.wait(job.id, lambda now: now.stage == "compare", "the comparison")
    assert list(running.losses(job.id)) == list(range(1, steps + 1))
    assert done.checkpoints[-1].step == steps
    assert running.processes(job.id) == []
    running.stores.finetunes.want(OWNER, job.id, "cancel")
    return running.wait_state(job.id, FinetuneState.CANCELLED)


def in_the_middle(running: Running, step: int = 25, **recipe: int) -> Finetune:
    """A job that trains and has saved two checkpoints."""
    job = create(running.stores, **{**LONG, **recipe})
    return running.wait_step(job.id, step)


def resumed_from(running: Running, job: Finetune) -> list[int]:
    """The steps that attempts went on from."""
    return [
        int(step) for step in re.findall(r"goes on from step (\d+) of", running.messages(job.id))
    ]


# --- all goes well -------------------------------------------------------------------------------


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
    assert done.progress.step == done.progress.total_steps == 60
    finished(running, job, 60)


def test_two_jobs_train_at_once_and_a_third_is_looked_at_meanwhile(running: Running) -> None:
    """Given room for two, when three are there, then the third's data is checked all the same."""
    jobs = [create(running.stores, **LONGER) for _ in range(2)]
    # Whoever's data is checked first is trained first, so the third comes when both are trained.
    for job in jobs:
        running.wait_step(job.id, 1)
    assert running.trainer_pid(jobs[0].id) != running.trainer_pid(jobs[1].id)
    jobs.append(create(running.stores, **LONG))
    third = running.wait(
        jobs[2].id, lambda now: now.state is FinetuneState.QUEUED and bool(now.data_report), "it"
    )
    assert third.progress.step == 0
    for job, steps in zip(jobs, (3 * STEPS, 3 * STEPS, STEPS), strict=True):
        finished(running, job, steps)


def test_a_paused_job_gives_its_place_away_and_loses_no_step(running: Running) -> None:
    """Given a job in training, when paused and resumed, then it goes on where it stopped."""
    job = in_the_middle(running)
    store = running.stores.finetunes
    store.want(OWNER, job.id, "pause")
    paused = running.wait_state(job.id, FinetuneState.PAUSED, limit_s=10)
    assert running.processes(job.id) == []
    last = paused.checkpoints[-1].step
    assert last == max(running.losses(job.id))
    store.want(OWNER, job.id, "run")
    running.wait_step(job.id, last + 1)
    assert resumed_from(running, job) == [last]
    finished(running, job, STEPS)


def test_a_cancelled_job_keeps_its_checkpoints(running: Running) -> None:
    """Given a job in training, when cancelled, then it stops within seconds and can be looked at."""
    job = in_the_middle(running)
    running.stores.finetunes.want(OWNER, job.id, "cancel")
    ended = running.wait_state(job.id, FinetuneState.CANCELLED, limit_s=10)
    assert running.processes(job.id) == []
    folder = running.stores.finetunes.path(job.id)
    assert all((folder / one.path / "weights").exists() for one in ended.checkpoints)


# --- somebody is killed --------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["trainer", "supervisor"])
def test_kill_9_in_the_middle(running: Running, victim: str) -> None:
    """Given kill -9, then it goes on from the last checkpoint, and no process is left."""
    job = in_the_middle(running)
    before = running.processes(job.id)
    find = running.trainer_pid if victim == "trainer" else running.supervisor_pid
    running.kill(find(job.id))
    wait_for(lambda: not set(before) & set(running.processes(job.id)), "their end", 10)
    finished(running, job, STEPS)
    [step] = resumed_from(running, job)
    assert (step >= 20, step % 10) == (True, 0)


def test_kill_9_of_the_consumer(own: Running) -> None:
    """Given kill -9 of the consumer, then the trainer saves, and the next one goes on from there."""
    job = in_the_middle(own)
    own.kill(own.consumer_pid())
    finished(own, job, STEPS)
    assert "Its worker died" in own.messages(job.id)
    [step] = resumed_from(own, job)
    assert step % 10, "it was not asked to save"


def test_kill_9_of_the_node(own: Running) -> None:
    """Given kill -9 of the node, when it starts again, then it ends what is left and goes on."""
    job = in_the_middle(own)
    assert own.node.process is not None
    own.node.process.kill()
    own.node.process.wait()
    start(own)
    finished(own, job, STEPS)


def test_stopping_in_good_order_loses_no_step(own: Running) -> None:
    """Given SIGTERM (Ctrl-C) to the node, then training saves first and later goes on there."""
    job = in_the_middle(own)
    assert own.node.stop() == 0
    assert_nothing_left(own.node)
    saved = sorted(
        own.stores.finetunes.path(job.id).glob("work/*/iter_*.pth"), key=os.path.getmtime
    )
    last = int(saved[-1].name.removeprefix("iter_").removesuffix(".pth"))
    start(own)
    finished(own, job, STEPS)
    assert resumed_from(own, job) == [last]
    assert "Its worker" not in own.messages(job.id)


def test_a_consumer_paused_past_its_lease(own: Running) -> None:
    """Given SIGSTOP, then another consumer goes on, and the first does no harm when it wakes."""
    job = in_the_middle(own, **LONGER)
    sleeper = own.consumer_pid()
    os.kill(sleeper, signal.SIGSTOP)
    command = [sys.executable, "-m", "workers.consumer", "finetune"]
    second = subprocess.Popen(
        [*command, "--config", str(own.node.settings.run_dir / "settings.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        own.wait(job.id, lambda now: now.token > job.token, "another holder")
        own.wait_step(job.id, job.progress.step + 20)
        os.kill(sleeper, signal.SIGCONT)
        finished(own, job, 3 * STEPS)
        assert len(resumed_from(own, job)) == 1
    finally:
        os.kill(sleeper, signal.SIGCONT)
        second.terminate()
        second.wait(timeout=30)


def test_training_goes_on_while_redis_is_away(own: Running) -> None:
    """Given a Redis that hangs past the lease and then dies, then the same trainer goes on."""
    job = in_the_middle(own, **LONGER)
    trainer, redis, told = own.trainer_pid(job.id), own.node.redis_pid(), job.progress.step
    socket = redis_server.socket_path(own.node.settings)
    os.kill(redis, signal.SIGSTOP)
    time.sleep(QUEUE["lease_ttl_s"] + 1)
    os.kill(redis, signal.SIGKILL)
    os.kill(redis, signal.SIGCONT)
    wait_for(lambda: redis_server.answers(socket), "Redis", LIMIT_S, own.node.story)
    own.wait(job.id, lambda now: now.progress.step > told, "news")
    assert own.trainer_pid(job.id) == trainer
    finished(own, job, 3 * STEPS)


# --- it cannot go on -----------------------------------------------------------------------------


def test_a_loss_that_is_no_number_fails_the_job(running: Running) -> None:
    """Given NaN at step 25, then the job fails there and the last good checkpoint is kept."""
    assert running.interpreter is not None
    set_faults(running.interpreter.parent, kind="nan", at=25)
    failed = running.wait_state(create(running.stores).id, FinetuneState.FAILED)
    assert failed.error is not None
    assert failed.error.code == "loss_bad"
    assert "at step 25" in failed.error.message
    assert "The checkpoint of step 20 is kept" in failed.error.message
    assert [one.step for one in failed.checkpoints] == [10, 20]


def test_a_trainer_that_always_dies_is_given_up(running: Running) -> None:
    """Given a crash before the first checkpoint, then it is tried three times and its log quoted."""
    assert running.interpreter is not None
    set_faults(running.interpreter.parent, kind="crash", at=5, always=True)
    try:
        job = create(running.stores)
        failed = running.wait_state(job.id, FinetuneState.FAILED)
    finally:
        set_faults(running.interpreter.parent)
    assert failed.error is not None
    assert failed.error.code == "training_crashed"
    assert "for the 3rd time in a row" in failed.error.message
    assert "an illegal memory access" in failed.error.message
    assert running.messages(job.id).count("it begins anew") == 2


def test_a_trainer_that_gets_further_each_time_is_not_given_up(running: Running) -> None:
    """Given four deaths, each after a new checkpoint, then the job comes to its end."""
    assert running.interpreter is not None
    job = create(running.stores, **LONG)
    for step in (15, 35, 55, 75):
        set_faults(running.interpreter.parent, kind="kill", at=step)
        running.wait_step(job.id, step + 1)
    finished(running, job, STEPS)


def test_data_that_is_removed_is_named(running: Running) -> None:
    """Given the job's data deleted while it trains, when it dies of that, then it says so."""
    job = in_the_middle(running)
    shutil.rmtree(running.stores.finetunes.path(job.id) / "data" / "images")
    running.kill(running.trainer_pid(job.id))
    failed = running.wait_state(job.id, FinetuneState.FAILED)
    assert failed.error is not None
    assert failed.error.code == "training_data_gone"
    assert "24 of the job's 24 images were removed" in failed.error.message


def test_bad_data_fails_before_anything_is_trained(running: Running) -> None:
    """Given rows that are no rows, then the job fails with counts and the first bad line."""
    job = create(running.stores, content=b'{"messages": []}\n' * 10, data={"format": "openai"})
    failed = running.wait_state(job.id, FinetuneState.FAILED)
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("too_many_bad_rows", "training_file")
    assert failed.data_report["bad_rows"][0]["line"] == 1
    assert failed.started_at is None


def test_a_recipe_that_cannot_be_is_refused_by_its_field(running: Running) -> None:
    """Given a context longer than the model's, then the job fails and names the field."""
    failed = running.wait_state(
        create(running.stores, max_length=1_000_000).id, FinetuneState.FAILED
    )
    assert failed.error is not None
    assert failed.error.param == "max_length"


def test_a_job_without_held_out_rows_is_refused(running: Running) -> None:
    """Given nothing to compare on, then that is said before training, not after."""
    job = create(running.stores, data={"held_out_share": 0.0})
    failed = running.wait_state(job.id, FinetuneState.FAILED)
    assert failed.error is not None
    assert failed.error.param == "held_out_share"


def test_a_base_that_is_removed_is_named(own: Running) -> None:
    """Given the base unlinked while it is tuned, when the trainer dies, then the job says so."""
    job = in_the_middle(own)
    own.stores.models.remove("tiny")
    time.sleep(1.5)  # others may know it for a second longer
    own.kill(own.trainer_pid(job.id))
    failed = own.wait_state(job.id, FinetuneState.FAILED)
    assert failed.error is not None
    assert failed.error.code == "base_model_gone"
    assert failed.checkpoints
