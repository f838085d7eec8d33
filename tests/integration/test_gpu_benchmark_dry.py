"""The GPU benchmark's dry run: everything but the GPU and raw lmdeploy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running_node import wait_for

pytestmark = pytest.mark.slow


def start(program: str, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """``python -m benchmarks.gpu.PROGRAM`` with the echo engine."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"benchmarks.gpu.{program}", "--engine", "echo"),
            *("--out", str(out), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def figures(out: Path) -> dict[str, Any]:
    """What was written, by name; of two with one name the last."""
    return {row["name"]: row for row in json.loads(out.read_text())["figures"]}


def test_a_dry_run_measures_every_row_and_says_what_it_is(tmp_path: Path) -> None:
    """With a whole node over HTTP; nothing in it can be taken for a GPU's figure."""
    out = tmp_path / "gpu.json"
    process = start("run", out)
    printed, progress = process.communicate(timeout=100)
    assert process.returncode == 0, progress
    assert "DRY RUN" in printed
    found = figures(out)
    for row in ("448 px", "448 px in base64", "1920x1080", "12 megapixels, one tile"):
        assert found[f"{row}: vlmq"]["value"] > 0
        assert f"{row}: vlmq / raw" not in found
    assert {"first token p95: vlmq, idle", "first token p95: busy / idle"} <= found.keys()
    assert all("dry run" in row["benchmark"] for row in found.values())
    measured = json.loads(out.read_text())["measured"]
    assert any("raw lmdeploy was not measured" in note for note in measured["notes"])


def test_a_run_that_is_ended_keeps_what_it_has(tmp_path: Path) -> None:
    """SIGTERM in the second row: the first is written, and the status says it is not all."""
    out = tmp_path / "gpu.json"
    process = start("run", out, "--only", "448", "1080p", "--size", "1080p.ours=20000")
    wait_for(lambda: out.exists() and "448 px: vlmq" in figures(out), "the first row", 60)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "ended from outside" in printed
    assert "448 px: vlmq" in figures(out)
    assert "1920x1080: vlmq" not in figures(out)


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    """Rather than measure something else."""
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PATH": str(tmp_path)}
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 2
    assert "no NVIDIA GPU" in answer.stderr
    assert "--engine echo" in answer.stderr


def test_what_is_broken_in_a_dry_run_is_accounted_for(tmp_path: Path) -> None:
    """An engine killed in the middle, a thousand broken pictures, a prompt too long."""
    out = tmp_path / "faults.json"
    process = start("faults", out, "--size", "448.ours=1500")
    printed, progress = process.communicate(timeout=110)
    assert process.returncode == 0, progress + printed
    rows = json.loads(out.read_text())["figures"]
    lost = [row for row in rows if row["name"] == "items without exactly one line"]
    assert [row["value"] for row in lost] == [0, 0]
    assert {row["name"] for row in rows} >= {"engines that died", "wrong outcomes"}
    assert all(row["passed"] is not False for row in rows)
