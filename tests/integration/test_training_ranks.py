"""Several training processes as one program, with loaders of their own; gloo stands for NCCL."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.training_runs import Run, Site, wait_until
from workers.training.orders import TrainerExit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def of_session(leader: int) -> list[int]:
    """The living processes of a session, its leader left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == leader and fields[0] != "Z" and int(entry.name) != leader:
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def stopped(site: Site) -> Run:
    """Two processes that were stopped by a signal to the whole group, loaders too."""
    run = site.run({"save_every": 100, "n_epochs": 50}, gpus=2)
    with run.started() as process:
        wait_until(lambda: len(run.metrics()) >= 2 or process.poll() is not None, "steps")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(90) == TrainerExit.STOPPED, run.log()[-3000:]
        assert of_session(process.pid) == []
    return run


def test_all_processes_stop_at_the_same_step_with_one_checkpoint(stopped: Run) -> None:
    (saved,) = stopped.checkpoints()
    names = {path.name for path in saved.path.iterdir()}
    assert {"random_0.pt", "random_1.pt"} <= names
    assert sum("optim_states" in name for name in names) == 2


def test_killing_the_program_leaves_no_process(site: Site, stopped: Run) -> None:
    run = site.run(
        {"save_every": 100, "n_epochs": 50}, gpus=2, resume=str(stopped.checkpoints()[0].path)
    )
    with run.started() as process:
        wait_until(lambda: run.metrics() or process.poll() is not None, "a step")
        assert process.poll() is None, run.log()[-3000:]
        assert run.metrics()[0].step > stopped.checkpoints()[0].step
        assert len(of_session(process.pid)) >= 2
        process.kill()
        process.wait()
        wait_until(lambda: not of_session(process.pid), "the end of all")
