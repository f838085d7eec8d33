"""The fine-tune benchmark's dry run: xtuner's own training and ours, of a tiny model on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("xtuner") is None, reason="needs vlmq[training] beside the tests"
    ),
]


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks.gpu.finetune --dry``."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu.finetune", "--dry"),
            *("--out", str(out), "--budget-s", "380", *arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=390,
        check=False,
    )


def test_our_losses_are_those_of_stock_training(tmp_path: Path) -> None:
    """At every iteration, and the learning rates too, with dropout and all.

    xtuner's own ``train.py`` attends eagerly and checkpoints gradients; ours does neither. The
    tolerance is that of bfloat16: 0.002 of a loss of 6.3.
    """
    out = tmp_path / "dry.json"
    answer = run(out, "--only", "stock", "curve")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "DRY RUN" in answer.stdout
    measured = json.loads(out.read_text())["measured"]
    assert measured["failed"] is False
    stock, ours = (training["observed"]["iterations"] for training in measured["trainings"])
    assert len(stock) == len(ours) == 8
    for theirs, own in zip(stock, ours, strict=True):
        assert own["loss"] == pytest.approx(theirs["loss"], abs=0.002)
        assert own["lr"] == pytest.approx(theirs["lr"])
    log = out.with_suffix(".log").read_text(errors="replace")
    # Two layers of the ViT and three of the language model.
    assert "PyTorch's attention in 5 modules" in log
    assert "logits of labelled tokens" in log
    assert max(entry["lr"] for entry in stock) == pytest.approx(3e-5)


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    """Rather than measure something else."""
    command = [sys.executable, "-m", "benchmarks.gpu.finetune", "--out", str(tmp_path / "f.json")]
    environment = {**os.environ, "PATH": str(tmp_path)}
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 2
    assert "no NVIDIA GPU" in answer.stderr
    assert "--dry" in answer.stderr
