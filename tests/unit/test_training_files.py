"""What is read of a trainer's files: progress, whole checkpoints, and a loss that goes wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from workers.training.loss_watch import WINDOW, LossWatch
from workers.training.orders import (
    RUN,
    Run,
    TrainerJob,
    Verdict,
    read_order,
    read_verdict,
    write_order,
)
from workers.training.progress import ProgressReader
from workers.training.saved import SEAL, checkpoint_at, checkpoints, newest, seal


def scalars(work_dir: Path, started: str) -> Path:
    path = work_dir / started / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    return path


def line(step: int, loss: float = 1.0, time_s: float = 0.5) -> str:
    raw = {"lr": 1e-4, "data_time": 0.1, "loss": loss, "time": time_s, "iter": step, "step": step}
    return json.dumps(raw) + "\n"


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    write_order(
        tmp_path / RUN,
        Run(iterations_per_step=2, total_steps=100, samples_per_step=8, steps_per_epoch=10.0),
    )
    return tmp_path


def test_metrics_are_counted_in_steps_with_rate_and_eta(work_dir: Path) -> None:
    scalars(work_dir, "1").write_text(line(20))
    (metric,) = ProgressReader(work_dir).new()
    assert (metric.step, metric.total_steps, metric.epoch) == (10, 100, 1.0)
    assert metric.samples_per_s == pytest.approx(8.0)
    assert metric.eta_s == pytest.approx(90.0)


def test_only_new_whole_lines_come(work_dir: Path) -> None:
    path = scalars(work_dir, "1")
    reader = ProgressReader(work_dir)
    path.write_text(line(2) + line(4)[:30])
    assert [metric.step for metric in reader.new()] == [1]
    assert reader.new() == []
    path.write_text(line(2) + line(4) + line(6))
    assert [metric.step for metric in reader.new()] == [2, 3]


def test_a_bare_nan_is_a_metric_without_loss(work_dir: Path) -> None:
    scalars(work_dir, "1").write_text(line(2, math.nan))
    assert "NaN" in line(2, math.nan)
    assert [metric.loss for metric in ProgressReader(work_dir).new()] == [None]


def test_each_resume_opens_another_folder_and_no_step_comes_twice(work_dir: Path) -> None:
    scalars(work_dir, "20260101_000000").write_text(line(2) + line(4) + line(6)[:10])
    reader = ProgressReader(work_dir)
    assert [metric.step for metric in reader.new()] == [1, 2]
    scalars(work_dir, "20260101_000100").write_text(line(4) + line(6))
    assert [metric.step for metric in reader.new()] == [3]


def test_a_reader_can_begin_after_a_step(work_dir: Path) -> None:
    scalars(work_dir, "1").write_text(line(2) + line(4))
    assert [metric.step for metric in ProgressReader(work_dir, after_step=1).new()] == [2]


def test_before_the_trainer_has_begun_there_is_nothing(tmp_path: Path) -> None:
    assert ProgressReader(tmp_path).new() == []
    assert ProgressReader(tmp_path / "absent").new() == []
    assert checkpoints(tmp_path / "absent") == []


def test_lines_that_are_no_metrics_are_passed_over(work_dir: Path) -> None:
    scalars(work_dir, "1").write_text('{"other": 1, "step": 2}\nhalf a li\n' + line(4))
    assert [metric.step for metric in ProgressReader(work_dir).new()] == [2]


# --- checkpoints ---------------------------------------------------------------------------------


def written(work_dir: Path, iteration: int) -> Path:
    folder = work_dir / f"iter_{iteration}.pth"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"m" * 100)
    (folder / "optim.pt").write_bytes(b"o" * 300)
    return folder


def sealed(work_dir: Path, iteration: int) -> Path:
    folder = written(work_dir, iteration)
    seal(folder, iteration=iteration, step=iteration // 2, created_at=5, loss=0.5)
    return folder


def test_whole_checkpoints_are_listed_in_order(tmp_path: Path) -> None:
    for iteration in (100, 20, 8):
        sealed(tmp_path, iteration)
    found = checkpoints(tmp_path)
    assert [one.iteration for one in found] == [8, 20, 100]
    assert (found[0].step, found[0].size_bytes, found[0].loss) == (4, 400, 0.5)


def test_half_written_ones_never_count(tmp_path: Path) -> None:
    written(tmp_path, 2)
    cut = sealed(tmp_path, 4)
    (cut / "optim.pt").write_bytes(b"o" * 299)
    lacking = sealed(tmp_path, 6)
    (lacking / "model.pt").unlink()
    half_seal = sealed(tmp_path, 8)
    (half_seal / SEAL).write_bytes((half_seal / SEAL).read_bytes()[:-9])
    (tmp_path / "iter_10.pth").write_bytes(b"a file")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    assert checkpoints(tmp_path) == []
    assert checkpoint_at(tmp_path / "iter_12.pth") is None


def test_the_newest_of_all_attempts_is_the_furthest(tmp_path: Path) -> None:
    sealed(tmp_path / "1", 10)
    furthest = sealed(tmp_path / "2", 20)
    written(tmp_path / "3", 30)
    found = newest([tmp_path / name for name in ("1", "2", "3", "4")])
    assert found is not None
    assert found.path == furthest
    assert newest([tmp_path / "3"]) is None


# --- the loss ------------------------------------------------------------------------------------


def first_problem(losses: list[float]) -> tuple[int, str] | None:
    watch = LossWatch()
    for index, loss in enumerate(losses):
        problem = watch.problem(loss)
        if problem:
            return index, problem
    return None


def test_a_loss_that_falls_wobbles_or_jumps_once_is_fine() -> None:
    falling = [10.0 / (1 + index) for index in range(100)]
    assert first_problem(falling) is None
    assert first_problem([0.05, 0.9] * 100) is None
    assert first_problem([*falling, 50.0 * 0.2, *[0.1] * 50]) is None


def test_no_number_is_noticed_at_once() -> None:
    assert first_problem([1.0, math.nan]) == (1, "nan")
    assert first_problem([math.inf]) == (0, "nan")


def test_a_loss_that_goes_up_and_stays_is_diverging() -> None:
    found = first_problem([*[2.0] * WINDOW, *[9.0] * WINDOW])
    assert found is not None
    assert found[1] == "diverged"
    assert WINDOW < found[0] < 2 * WINDOW


# --- orders --------------------------------------------------------------------------------------


def test_orders_and_verdicts_come_back_as_they_were(tmp_path: Path) -> None:
    job = TrainerJob(
        config="c.py", work_dir="w", deepspeed="d.json", base="b", model_path="m", seed=1
    )
    write_order(tmp_path / "job.json", job)
    assert read_order(tmp_path / "job.json", TrainerJob) == job
    assert read_verdict(tmp_path) is None
    verdict = Verdict("nan", "at step 3 the loss is nan", 3, None, "w/iter_2.pth")
    write_order(tmp_path / "verdict.json", verdict)
    assert read_verdict(tmp_path) == verdict


def test_the_consumers_side_needs_no_model_library() -> None:
    modules = ("base_facts", "config", "loss_watch", "memory", "orders", "progress", "saved")
    imports = "; ".join(f"import workers.training.{name}" for name in modules)
    heavy = '{"torch", "numpy", "mmengine", "xtuner", "deepspeed", "transformers"}'
    code = f"{imports}; import sys; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
