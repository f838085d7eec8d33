"""What this project adds to a run of xtuner: whole checkpoints, stopping on request, a watch.

An iteration is one micro-batch. Weights change, and a checkpoint makes sense, only at the end of an
optimizer step, which is several iterations long where gradients are accumulated.
"""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.dist import all_reduce, barrier, broadcast, is_main_process
from mmengine.hooks import Hook

from shared.errors import StorageFull
from workers.training import randomness
from workers.training.loss_watch import LossWatch
from workers.training.orders import RUN, VERDICT, Run, TrainerExit, TrainerJob, Verdict, write_order
from workers.training.saved import checkpoint_name, checkpoints, seal
from workers.training.stopping import StopRequest

_WRITER = ("inline_container", "PytorchStreamWriter")


class TrainingStopped(SystemExit):
    """Training ends before its time, in good order. The code is a TrainerExit."""

    def __init__(self, status: TrainerExit) -> None:
        super().__init__(int(status))


class RunHook(Hook):  # type: ignore[misc]
    """Writes what the numbers of this run mean."""

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Called when everything is loaded."""
        per_step = iterations_per_step(runner)
        if is_main_process():
            write_order(
                Path(runner.work_dir) / RUN,
                Run(
                    iterations_per_step=per_step,
                    total_steps=runner.max_iters // per_step,
                    samples_per_step=int(runner.model.train_batch_size()),
                    steps_per_epoch=len(runner.train_dataloader) / per_step,
                ),
            )


class LossHook(Hook):  # type: ignore[misc]
    """Ends a run whose loss is no number or has left for good, before it is saved."""

    priority = "NORMAL"

    def __init__(self) -> None:
        self._watch = LossWatch()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Judge the loss of this iteration, the mean over all processes."""
        value = outputs["loss"].detach().float().clone()
        all_reduce(value, op="mean")
        loss = float(value)
        problem = self._watch.problem(loss)
        if problem == "nan":
            give_up(runner, "nan", f"the loss is {loss}; try a lower learning rate", loss=loss)
        if problem == "diverged":
            message = f"the loss went up to {loss:.3g} and stayed there; try a lower learning rate"
            give_up(runner, "diverged", message, loss=loss)


class SaveHook(Hook):  # type: ignore[misc]
    """Saves checkpoints that are whole or absent, and deletes old ones only after a new one.

    ``interval`` counts iterations. A request to stop is answered at the end of an optimizer step,
    with a checkpoint.
    """

    priority = "VERY_LOW"

    def __init__(self, job: TrainerJob, stop: StopRequest, interval: int) -> None:
        self._job = job
        self._stop = stop
        self._interval = interval
        self._work_dir = Path(job.work_dir)
        self._size_bytes = job.checkpoint_bytes

    def before_train(self, runner: Any) -> None:
        """From here on there is something to save."""
        self._stop.begun = True

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Save if it is time to, or if this is the last step for now."""
        iteration = runner.iter + 1
        if iteration % iterations_per_step(runner):
            return
        stopping = self._is_stopping()
        last = iteration >= runner.max_iters
        if stopping or last or self._is_due(iteration, iterations_per_step(runner)):
            self._save(runner, iteration, float(outputs["loss"].detach()))
        if stopping and not last:
            raise TrainingStopped(TrainerExit.STOPPED)

    def _is_due(self, iteration: int, per_step: int) -> bool:
        # The first end of a step at or after each multiple of the interval.
        return iteration // self._interval > (iteration - per_step) // self._interval

    def _is_stopping(self) -> bool:
        """Whether any process was asked to; all processes get the same answer."""
        asked = torch.tensor(float(self._stop.asked))
        all_reduce(asked, op="sum")
        return bool(asked > 0)

    def _save(self, runner: Any, iteration: int, loss: float) -> None:
        self._require_numbers(runner)
        self._require_space(runner)
        folder = self._work_dir / checkpoint_name(iteration)
        started = time.monotonic()
        try:
            self._write(runner, folder, iteration, loss)
        except (OSError, RuntimeError, StorageFull) as error:
            if not _is_disk(error):
                raise
            free = shutil.disk_usage(self._work_dir).free
            shutil.rmtree(folder, ignore_errors=True)
            message = f"{folder.name} could not be written: {free >> 20} MiB are free ({error})"
            give_up(runner, "disk", message)
        if is_main_process():
            runner.logger.info("Saved %s in %.1f s", folder.name, time.monotonic() - started)
            self._delete_old()
        barrier()

    def _write(self, runner: Any, folder: Path, iteration: int, loss: float) -> None:
        runner.save_checkpoint(
            str(self._work_dir),
            folder.name,
            save_optimizer=True,
            save_param_scheduler=True,
            meta={"iter": iteration, "epoch": 0},
            by_epoch=False,
        )
        randomness.save(folder)
        barrier()
        if is_main_process():
            step = iteration // iterations_per_step(runner)
            seal(folder, iteration=iteration, step=step, created_at=int(time.time()), loss=loss)

    def _delete_old(self) -> None:
        kept = checkpoints(self._work_dir)
        self._size_bytes = kept[-1].size_bytes
        (self._work_dir / "last_checkpoint").write_text(str(kept[-1].path), encoding="utf-8")
        for old in kept[: -self._job.keep_checkpoints]:
            # Without its seal it is no checkpoint any more, however far the rest gets.
            (old.path / "sealed.json").unlink()
            shutil.rmtree(old.path)

    def _require_numbers(self, runner: Any) -> None:
        """A loss is computed before the step, so the weights after it may be bad all the same."""
        bad = torch.zeros(1)
        for parameter in runner.model.parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                bad += 1
                break
        all_reduce(bad, op="sum")
        if float(bad):
            give_up(runner, "nan", "weights are no numbers any more; try a lower learning rate")

    def _require_space(self, runner: Any) -> None:
        needed = self._size_bytes + self._job.min_free_bytes
        room = torch.tensor(float(shutil.disk_usage(self._work_dir).free))
        broadcast(room, src=0)
        if room < needed:
            give_up(
                runner,
                "disk",
                f"a checkpoint takes {self._size_bytes >> 20} MiB and {self._job.min_free_bytes >> 20}"
                f" MiB are to stay free, but the disk has {int(room) >> 20} MiB left",
            )


def iterations_per_step(runner: Any) -> int:
    """Micro-batches per update of the weights."""
    return int(runner.model.gradient_accumulation_steps())


def give_up(runner: Any, reason: Any, message: str, *, loss: float | None = None) -> NoReturn:
    """Write the verdict and end the process; checkpoints stay."""
    work_dir = Path(runner.work_dir)
    step = (runner.iter + 1) // iterations_per_step(runner)
    kept = checkpoints(work_dir)
    resumed = runner._load_from if runner._resume else None  # noqa: SLF001
    last = str(kept[-1].path) if kept else resumed
    if is_main_process():
        text = f"at step {step} {message}"
        shown = loss if loss is not None and torch.isfinite(torch.tensor(loss)) else None
        write_order(work_dir / VERDICT, Verdict(reason, text, step, shown, last))
    full = reason == "disk"
    raise TrainingStopped(TrainerExit.DISK_FULL if full else TrainerExit.LOSS_BAD)


def _is_disk(error: BaseException | None) -> bool:
    """Whether writing failed. Torch's writer says so in words of its own, whatever the disk said."""
    if error is None:
        return False
    if isinstance(error, StorageFull) or any(word in str(error) for word in _WRITER):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return _is_disk(error.__cause__ or error.__context__)
