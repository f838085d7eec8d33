"""Puts this project's loop, samples and hooks into a run that xtuner's train.py has built.

So that any configuration of xtuner's is run in the same way, the rendered ones and those that people
bring: nothing in a configuration names this project.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import FlexibleRunner
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.engine.runner import TrainLoop

from workers.training.hooks import LossHook, RunHook, SaveHook
from workers.training.loop import ResumingTrainLoop
from workers.training.orders import TrainerJob
from workers.training.samples import StrictSamples
from workers.training.speed import SpeedHook
from workers.training.stopping import StopRequest

_DEFAULT_INTERVAL = 64


def take_over(job: TrainerJob, stop: StopRequest) -> None:
    """Have every run of this process prepared by :func:`prepare` before it trains."""
    original: Callable[[Any], Any] = FlexibleRunner.train

    def train(runner: Any) -> Any:
        prepare(runner, job, stop)
        return original(runner)

    FlexibleRunner.train = train


def prepare(runner: Any, job: TrainerJob, stop: StopRequest) -> None:
    """Replace what is in the way and add the hooks. ``runner`` has not built its loop yet."""
    dataset = runner._train_dataloader["dataset"]  # noqa: SLF001
    if dataset.get("type") in (InternVL_V1_5_Dataset, InternVL_V1_5_Dataset.__name__):
        dataset["type"] = StrictSamples
    loop = runner._train_loop  # noqa: SLF001
    if loop.get("type") in (TrainLoop, TrainLoop.__name__):
        loop["type"] = ResumingTrainLoop
        ResumingTrainLoop.resumed_from = Path(job.resume) if job.resume else None
    interval = _interval(runner)
    runner._hooks = [  # noqa: SLF001
        hook
        for hook in runner._hooks  # noqa: SLF001
        if not isinstance(hook, CheckpointHook)
    ]
    runner.register_hook(RunHook())
    runner.register_hook(SpeedHook(job.speed))
    runner.register_hook(LossHook())
    runner.register_hook(SaveHook(job, stop, interval))


def _interval(runner: Any) -> int:
    """Iterations between two checkpoints, as the configuration says."""
    for hook in runner._hooks:  # noqa: SLF001
        if isinstance(hook, CheckpointHook) and not hook.by_epoch and hook.interval > 0:
            return int(hook.interval)
    return _DEFAULT_INTERVAL
