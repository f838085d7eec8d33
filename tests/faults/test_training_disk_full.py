"""A disk that runs full in the middle of a checkpoint, on a real small filesystem."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.faults.test_storage_full import small_disk
from tests.training_runs import Site, run_module
from workers.training.orders import TrainerExit, read_verdict, write_order
from workers.training.saved import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def test_half_a_checkpoint_is_taken_away_again(tmp_path: Path) -> None:
    """The guard before a checkpoint knows its size only by estimate; here it is told nothing."""
    site = Site(tmp_path / "site")
    run = site.run({"save_every": 2}, checkpoint_bytes=0)
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 5):
        write_order(run.path, msgspec.structs.replace(run.order, work_dir=str(disk / "work")))
        finished = run_module("workers.training.trainer", run.path)
        assert finished.status == TrainerExit.DISK_FULL, finished.output[-3000:]
        assert list((disk / "work").glob("iter_*")) == []
        verdict = read_verdict(disk / "work")
    assert verdict is not None
    assert verdict.reason == "disk"
    assert "iter_2.pth could not be written: 0 MiB are free" in verdict.message


def test_an_old_checkpoint_goes_only_after_a_new_one_is_whole(tmp_path: Path) -> None:
    """xtuner deletes first: where the new one then cannot be written, one less is left."""
    site = Site(tmp_path / "site")
    run = site.run({"save_every": 2, "keep_checkpoints": 2})
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 18):
        write_order(run.path, msgspec.structs.replace(run.order, work_dir=str(disk / "work")))
        finished = run_module("workers.training.trainer", run.path)
        assert finished.status == TrainerExit.DISK_FULL, finished.output[-3000:]
        assert [saved.step for saved in checkpoints(disk / "work")] == [2, 4]
        verdict = read_verdict(disk / "work")
    assert verdict is not None
    assert verdict.checkpoint is not None
    assert verdict.checkpoint.endswith("iter_4.pth")
