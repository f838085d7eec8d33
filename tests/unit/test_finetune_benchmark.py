"""The parts of the fine-tune benchmark that train nothing: figures, settings, what xtuner writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from benchmarks.gpu.finetune import main
from benchmarks.gpu.finetune_results import (
    CURVE,
    LOSS_TOLERANCE,
    OURS,
    STOCK,
    Findings,
    Training,
    figures,
)
from benchmarks.gpu.stock import Tutorial
from benchmarks.gpu.training_data import write_rows
from benchmarks.gpu.training_process import Iteration, Observed, iterations, last_checkpoint
from benchmarks.gpu.tuned import Variant, like_stock
from benchmarks.report import Figure
from shared.errors import ConfigurationError


def training(
    name: str, *, seconds: float, micro: int = 4, gpus: int = 1, losses: tuple[float, ...] = ()
) -> Training:
    """Iterations of ``seconds``, after one of a minute that does not count."""
    times = [60.0, seconds, seconds, seconds]
    found = losses or (11.4, 11.3, 11.2, 11.1)
    return Training(
        name,
        gpus,
        micro,
        2,
        1,
        Observed(
            iterations=[
                Iteration(step, loss, time, 0.1 * time, 3e-5, 25_000.0)
                for step, (time, loss) in enumerate(zip(times, found, strict=True))
            ],
            startup_s=20.0,
            wall_s=90.0,
            checkpoint_s=3.0,
            checkpoint_bytes=300 << 20,
            used_gib=30.0,
        ),
    )


def by_name(*trainings: Training, dry: bool = False) -> dict[str, Figure]:
    """The figures that follow."""
    found = figures(Findings(dry=dry, trainings=list(trainings)))
    return {figure.name: figure for figure in found}


def test_a_rate_counts_samples_of_all_gpus_after_the_warm_up() -> None:
    """Four samples in two seconds, on two GPUs; the first iteration does not count."""
    assert training(STOCK, seconds=2.0).rate == pytest.approx(2.0)
    assert training("gpus", seconds=2.0, gpus=2).rate == pytest.approx(4.0)


def test_ours_has_to_be_several_times_stock() -> None:
    """Only the row with every choice left open has a target."""
    found = by_name(
        training(STOCK, seconds=2.0), training(OURS, seconds=0.6), training("b16", seconds=1.0)
    )
    assert found["ours / stock"].value == pytest.approx(2.0 / 0.6)
    assert found["ours / stock"].passed
    assert found["b16 / stock"].target is None


def test_a_cache_is_paid_for_by_the_epochs() -> None:
    """Sixteen samples an epoch at 4/s are 40 s in ten; another 40 s for the cache halve the rate."""
    cached = msgspec.structs.replace(training("cached", seconds=1.0), cached_s=40.0)
    assert cached.rate == pytest.approx(4.0)
    assert cached.rate_over(10) == pytest.approx(2.0)
    found = by_name(training(STOCK, seconds=4.0), cached)
    assert found["cached / stock"].value == pytest.approx(4.0)
    assert found["cached / stock, 10 epochs"].value == pytest.approx(2.0)


def test_two_gpus_are_held_against_one() -> None:
    """As fast each as one alone is twice; a third more time is not enough."""
    alone = training(OURS, seconds=1.0)
    assert by_name(alone, training("gpus", seconds=1.0, gpus=2))["gpus: 2 GPUs / one"].passed
    slow = by_name(alone, training("gpus", seconds=1.3, gpus=2))["gpus: 2 GPUs / one"]
    assert slow.passed is False


def test_a_loss_that_leaves_stocks_is_a_miss() -> None:
    """One iteration in the middle is enough."""
    stock, close, far = (
        training(STOCK, seconds=1.0),
        training(CURVE, seconds=1.0, losses=(11.4, 11.3001, 11.2, 11.1)),
        training(CURVE, seconds=1.0, losses=(11.4, 11.3 + 2 * LOSS_TOLERANCE, 11.2, 11.1)),
    )
    assert by_name(stock, close)["losses apart from stock's"].passed
    assert by_name(stock, far)["losses apart from stock's"].passed is False


def test_equal_losses_that_never_fell_are_a_miss() -> None:
    """With a learning rate of nothing any two trainings agree."""
    flat = (11.4, 11.4, 11.4, 11.4)
    found = by_name(
        training(STOCK, seconds=1.0, losses=flat), training(CURVE, seconds=1.0, losses=flat)
    )
    assert found["losses apart from stock's"].passed
    assert found["stock's loss fell by"].passed is False


def test_a_dry_run_has_no_targets() -> None:
    """Its numbers are not a GPU's."""
    found = by_name(training(STOCK, seconds=1.0), training(OURS, seconds=9.0), dry=True)
    assert all(figure.target is None for figure in found.values())


def test_changes_go_to_their_part() -> None:
    """Everything else of the row stays."""
    changed = (
        Variant("b16")
        .changed("micro", 16)
        .changed("recipe.batch_size", 16)
        .changed("speed.attention", "stock")
        .changed("recipe.lora_rank", 8)
    )
    assert (changed.micro, changed.gpus) == (16, 1)
    assert changed.recipe == {"batch_size": 16, "lora_rank": 8}
    assert changed.speed == {"attention": "stock"}


def test_a_change_of_nothing_known_is_refused() -> None:
    """With what may be changed."""
    with pytest.raises(ConfigurationError, match="recipe, resolved, speed, config"):
        Variant("ours").changed("batch", 16)


def test_the_curve_is_trained_as_stock_is() -> None:
    """Stock's micro-batch, its warm-up in iterations, and LoRA on the head."""
    curve = like_stock(Tutorial(warmup_ratio=0.1), 40)
    assert curve.micro == 4
    assert curve.config["warmup_iterations"] == 4
    assert "output" in curve.config["llm_targets"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "20"], "multiple of 16"),
        (["--set", "ours:speed"], r"\[ROW:\]KEY=VALUE"),
        (["--set", "batch=16"], "PART.FIELD"),
    ],
)
def test_wrong_arguments_are_said_before_anything_starts(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to write instead."""
    assert main(["--dry", "--out", str(tmp_path / "out.json"), *arguments]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_llava_rows_with_pictures(tmp_path: Path) -> None:
    """Each names a picture that is there."""
    rows = write_rows(tmp_path, 4, distinct=1)
    found = json.loads(rows.file.read_text())
    assert len(found) == rows.count == 4
    assert all((rows.images / row["image"]).is_file() for row in found)
    assert {turn["from"] for turn in found[0]["conversations"]} == {"human", "gpt"}


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    """And other scalars are none of an iteration."""
    whole = {"step": 1, "iter": 1, "loss": 6.2, "time": 0.1, "data_time": 0.01, "lr": 1e-5}
    folder = tmp_path / "20260101_000000" / "vis_data"
    folder.mkdir(parents=True)
    text = json.dumps({"step": 0, "other": 1}) + "\n" + json.dumps(whole) + "\n" + '{"step": 2, "l'
    (folder / "scalars.json").write_text(text)
    assert [msgspec.structs.asdict(found)["loss"] for found in iterations(tmp_path)] == [6.2]


def test_a_training_without_a_checkpoint_is_a_failure(tmp_path: Path) -> None:
    """Rather than a conversion of nothing."""
    with pytest.raises(AssertionError, match="no checkpoint"):
        last_checkpoint(tmp_path)
