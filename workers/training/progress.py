"""How far a trainer is, read from the files it writes. Needs no model library.

xtuner appends a JSON object to ``TIMESTAMP/vis_data/scalars.json`` every few iterations. Each resume
opens another timestamp; a loss may be a bare ``NaN``; the last line may be cut while it is written.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path

import msgspec

from workers.training.orders import RUN, Run, read_order
from workers.training.saved import checkpoints

__all__ = ["Metric", "ProgressReader", "checkpoints"]

_RATE_METRICS = 20  # metrics whose mean duration gives the rate and the eta


class Metric(msgspec.Struct, frozen=True):
    """The state after ``step`` optimizer steps. ``loss`` is None if it was no number."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    learning_rate: float
    samples_per_s: float
    eta_s: float


class ProgressReader:
    """Reads what is new in a work folder; one per attempt and consumer.

    Steps that were already reported do not come again, so a reader can be given a folder whose
    trainer resumed.
    """

    def __init__(self, work_dir: Path, *, after_step: int = 0) -> None:
        self._work_dir = work_dir
        self._run: Run | None = None
        self._read: dict[Path, int] = {}
        self._last_step = after_step
        self._times: deque[float] = deque(maxlen=_RATE_METRICS)

    def new(self) -> list[Metric]:
        """Metrics that were written since the last call, in the order of their steps."""
        if self._run is None and (self._work_dir / RUN).is_file():
            self._run = read_order(self._work_dir / RUN, Run)
        if self._run is None:
            return []
        metrics = []
        for path in sorted(self._work_dir.glob("*/vis_data/scalars.json")):
            for line in self._whole_lines(path):
                metric = self._metric(line, self._run)
                if metric is not None and metric.step > self._last_step:
                    self._last_step = metric.step
                    metrics.append(metric)
        return metrics

    def _whole_lines(self, path: Path) -> list[bytes]:
        start = self._read.get(path, 0)
        with open(path, "rb") as stream:
            stream.seek(start)
            text = stream.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._read[path] = start + len(whole) + len(newline)
        return whole.splitlines()

    def _metric(self, line: bytes, run: Run) -> Metric | None:
        try:
            raw = json.loads(line)  # the standard library's reader takes a bare NaN
            iteration, loss, rate, time_s = (
                raw["step"], float(raw["loss"]), float(raw["lr"]), float(raw["time"])
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            return None  # other scalars, or half a line from before a crash
        self._times.append(time_s)
        per_iteration_s = sum(self._times) / len(self._times)
        step_s = per_iteration_s * run.iterations_per_step
        step = iteration // run.iterations_per_step
        return Metric(
            step=step,
            total_steps=run.total_steps,
            epoch=step / run.steps_per_epoch,
            loss=loss if math.isfinite(loss) else None,
            learning_rate=rate,
            samples_per_s=run.samples_per_step / step_s if step_s > 0 else 0.0,
            eta_s=max(0, run.total_steps - step) * step_s,
        )
