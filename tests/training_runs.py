"""Real runs of the trainer: the tiny model on scenes, xtuner and DeepSpeed on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shared.finetunes import Recipe
from workers.inference.tiny import CHECKPOINT, scenes
from workers.training.base_facts import read_base_facts
from workers.training.config import (
    Hardware,
    Resolved,
    TrainingPaths,
    deepspeed_file,
    render,
    resolve,
)
from workers.training.orders import ConvertJob, Speed, TrainerJob, write_order
from workers.training.progress import Metric, ProgressReader
from workers.training.saved import SavedCheckpoint, checkpoints

LIMIT_S = 150
CPU = Hardware(gpus=0, memory_bytes=16 << 30, cores=2, free_disk_bytes=1 << 40)
_STOCK = """
import runpy, sys, tempfile
from pathlib import Path
from workers.training import surroundings

with tempfile.TemporaryDirectory() as cache:
    surroundings.prepare_environment(Path(cache))
    surroundings.single_process_group()
    surroundings.prepare_imports()
    surroundings.skip_compiling()
    import xtuner

    surroundings.attend_without_flash()
    path = str(Path(xtuner.__file__).parent / "tools/train.py")
    sys.argv = [path, *sys.argv[1:]]
    runpy.run_path(path, run_name="__main__")
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class Finished:
    """A run that ended: its exit status and what it printed."""

    status: int
    output: str


@dataclass
class Run:
    """One attempt: its order, not yet started."""

    order: TrainerJob
    path: Path
    resolved: Resolved

    @property
    def work_dir(self) -> Path:
        return Path(self.order.work_dir)

    def metrics(self) -> list[Metric]:
        return ProgressReader(self.work_dir).new()

    def losses(self) -> dict[int, float | None]:
        return {metric.step: metric.loss for metric in self.metrics()}

    def checkpoints(self) -> list[SavedCheckpoint]:
        return checkpoints(self.work_dir)

    def run(self) -> Finished:
        """Train to whatever end."""
        return run_module("workers.training.trainer", self.path)

    def run_stock(self) -> Finished:
        """Train by xtuner's own train.py, which knows nothing of this project."""
        return run_command(
            [
                *(sys.executable, "-c", _STOCK, self.order.config, "--seed", "5"),
                *("--work-dir", self.order.work_dir, "--deepspeed", self.order.deepspeed),
            ]
        )

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """Train in the background; killed at the end of the block if it still runs."""
        log = self.path.with_suffix(".log")
        with (
            open(log, "wb") as stream,
            subprocess.Popen(
                [sys.executable, "-m", "workers.training.trainer", str(self.path)],
                stdout=stream,
                stderr=stream,
                env=ENVIRONMENT,
                start_new_session=True,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def log(self) -> str:
        return self.path.with_suffix(".log").read_text(errors="replace")


@dataclass
class Site:
    """Data and a base in a folder, for any number of runs."""

    root: Path
    base: Path = CHECKPOINT
    rows: int = 48
    _runs: int = field(default=0)

    def __post_init__(self) -> None:
        images = self.root / "images"
        images.mkdir(parents=True)
        rows = []
        for index, scene in enumerate(scenes.scenes("train", self.rows)):
            scene.image.save(images / f"{index}.png")
            # Captions turned round, so that the trained model has something to learn.
            turns = [("human", "<image>\nWhat is it?"), ("gpt", scene.caption[::-1])]
            rows.append(
                {
                    "image": f"{index}.png",
                    "image_wh": list(scene.image.size),
                    "conversations": [{"from": who, "value": text} for who, text in turns],
                }
            )
        (self.root / "train.json").write_text(json.dumps(rows))

    def run(self, recipe: dict[str, Any] | None = None, **order: Any) -> Run:
        """An attempt with these deviations from the automatic recipe and the plain order."""
        self._runs += 1
        resolved = resolve(
            msgspec.convert({"learning_rate": 1e-3, "n_epochs": 2, **(recipe or {})}, Recipe),
            rows=self.rows,
            longest_tokens=None,
            seed=5,
            base=read_base_facts(self.base),
            hardware=msgspec.structs.replace(CPU, gpus=order.get("gpus", 0)),
        )
        model_path = order.pop("model_path", self.root / "base")
        config = self.root / f"config{self._runs}.py"
        paths = TrainingPaths(model_path, self.root / "train.json", self.root / "images")
        micro = order.pop("micro_batch_size", None)
        if micro is not None:
            resolved = msgspec.structs.replace(
                resolved, micro_batch_size=micro, accumulation=resolved.batch_size // micro
            )
        # Several processes on the processor stand for several GPUs.
        config.write_text(render(resolved, paths).replace("'nccl'", "'gloo'"))
        plain = TrainerJob(
            config=str(config),
            work_dir=str(self.root / f"work{self._runs}"),
            deepspeed=str(deepspeed_file(resolved.deepspeed)),
            base=str(self.base),
            model_path=str(model_path),
            seed=resolved.seed,
            speed=Speed(gradient_checkpointing=resolved.gradient_checkpointing),
            keep_checkpoints=resolved.keep_checkpoints,
            checkpoint_bytes=resolved.checkpoint_bytes,
        )
        path = self.root / f"job{self._runs}.json"
        write_order(path, msgspec.structs.replace(plain, **order))
        return Run(msgspec.structs.replace(plain, **order), path, resolved)

    def convert(self, run: Run, checkpoint: Path, out: Path) -> Finished:
        """Convert a checkpoint of a run."""
        order = ConvertJob(
            config=run.order.config,
            checkpoint=str(checkpoint),
            base=run.order.base,
            model_path=run.order.model_path,
            out=str(out),
        )
        path = self.root / f"convert-{out.name}.json"
        write_order(path, order)
        return run_module("workers.training.convert", path)


def run_module(module: str, *arguments: Path | str) -> Finished:
    """Run one of the training interpreter's programs."""
    return run_command([sys.executable, "-m", module, *map(str, arguments)])


def run_command(command: Sequence[str]) -> Finished:
    """Run a command to its end."""
    ended = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=ENVIRONMENT,
        timeout=LIMIT_S,
        check=False,
    )
    return Finished(ended.returncode, ended.stdout)


def wait_until(condition: Any, what: str) -> None:
    """Wait until ``condition()`` holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.02)
