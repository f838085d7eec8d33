"""One attempt at training: a supervised trainer, watched until it ends, and what became of it.

Reads progress from files and tells the store; hears the owner's wishes through the lease. Redis may
be away meanwhile: what could not be told is told later, and training goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import (
    LeaseLost,
    LossBad,
    QueueUnavailable,
    StorageFailed,
    StorageFull,
    TrainingCrashed,
    VlmqError,
)
from shared.finetune_folder import FinetuneFolder
from shared.finetune_store import STEP_SECONDS, FinetuneLease, FinetuneStore, NewEvent
from shared.finetunes import Progress
from shared.log import get_logger
from shared.settings import MIB
from workers.keeper import until_answered
from workers.logfiles import tail
from workers.training.holding import Draining, Holding, StopWanted
from workers.training.job_folder import JobFolder
from workers.training.orders import TrainerExit, read_verdict
from workers.training.process import Ending, TrainingProcess
from workers.training.progress import Metric, ProgressReader
from workers.training.saved import SavedCheckpoint, checkpoints

log = get_logger(__name__)

POLL_S = 0.1
TELL_S = 1.0
"""How often progress is read and told."""
QUOTED_LINES = 8
DISK_RETRY_S = 20.0


class Postponed(VlmqError):
    """The job cannot go on right now; it is given back and tried again.

    ``waiting_for`` says why, for people; ``counts`` that an attempt died.
    """

    code = "postponed"

    def __init__(
        self, waiting_for: str, *, delay_s: float, counts: bool = False, message: str | None = None
    ) -> None:
        super().__init__(message or waiting_for)
        self.waiting_for = waiting_for
        self.delay_s = delay_s
        self.counts = counts
        self.event = message


@dataclass(frozen=True)
class AttemptLimits:
    """``keep`` checkpoints, at most ``max_attempts`` deaths in a row without a new one."""

    keep: int
    max_attempts: int


class Attempt:
    """Watches one trainer. ``run`` returns the last checkpoint when training is done."""

    def __init__(
        self,
        lease: FinetuneLease,
        store: FinetuneStore,
        holding: Holding,
        folder: JobFolder,
        limits: AttemptLimits,
        *,
        log_file: Path,
        resumed: SavedCheckpoint | None,
        why_broken: Callable[[], VlmqError | None],
    ) -> None:
        self._lease = lease
        self._store = store
        self._holding = holding
        self._folder = folder
        self._work = folder.attempt(lease.token)
        self._limits = limits
        self._log_file = log_file
        self._why_broken = why_broken
        self._resumed = resumed
        self._attempts = lease.attempts
        self._reader = ProgressReader(self._work, after_step=resumed.step if resumed else 0)
        self._untold: list[Metric] = []
        self._known: set[int] = set()
        self._dirty = False
        self._progress: Progress | None = None

    def run(self, process: TrainingProcess) -> SavedCheckpoint:
        """Watch it to its end.

        Raises: LeaseLost, StopWanted or Draining once it has stopped for that reason; Postponed if
        another attempt may do better; LossBad, TrainingCrashed and what ``why_broken`` says if not.
        """
        try:
            stopped = self._watch(process)
        except BaseException:
            # Whatever is wrong with the watching, nothing may train unwatched.
            process.stop()
            while not process.ended():
                time.sleep(POLL_S)
            process.status()
            raise
        ending = process.status()
        if isinstance(stopped, LeaseLost):
            raise stopped
        self._tell_the_rest()
        return self._judge(ending, stopped)

    def _watch(self, process: TrainingProcess) -> VlmqError | None:
        """Until it has ended; answers why it was asked to stop, if it was."""
        stopped: VlmqError | None = None
        tell_at = time.monotonic()
        while not process.ended():
            stopped = stopped or self._stop_if_asked(process)
            if time.monotonic() >= tell_at and not isinstance(stopped, LeaseLost):
                self._tell()
                tell_at = time.monotonic() + TELL_S
            time.sleep(POLL_S)
        return stopped

    def _stop_if_asked(self, process: TrainingProcess) -> VlmqError | None:
        try:
            self._holding.check()
        except LeaseLost as error:
            process.kill()
            return error
        except (StopWanted, Draining) as error:
            process.stop()
            return error
        return None

    # --- what is told while it runs ---

    def _tell(self) -> None:
        """Tell what is new. What cannot be told now is told next time."""
        try:
            self._look()
            self._send()
        except LeaseLost:
            return  # heard at the next renewal, too, which is where it ends the attempt
        except QueueUnavailable:
            log.info("progress_untold", job_id=self._lease.job_id, metrics=len(self._untold))
        except (StorageFull, StorageFailed) as error:
            log.warning("progress_untold", job_id=self._lease.job_id, error=error.message)

    def _tell_the_rest(self) -> None:
        """Tell the last of it, however long Redis is away. Raises: LeaseLost, Draining."""
        self._look()
        try:
            until_answered(self._send, self._holding.check_held)
        except (StorageFull, StorageFailed) as error:
            # The next attempt finds it in the files.
            log.warning("progress_untold", job_id=self._lease.job_id, error=error.message)

    def _look(self) -> None:
        new = self._reader.new()
        self._untold += new
        if new:
            self._progress = progress_of(new[-1])
            self._dirty = True
        own = {one.step for one in checkpoints(self._work)}
        if not own <= self._known:
            # A checkpoint beyond the last one: whoever died before it did not die in vain.
            self._attempts = 0
            self._known |= own
            self._dirty = True

    def _send(self) -> None:
        if self._untold:
            self._store.add_events(self._lease, map(event_of, self._untold))
            self._untold.clear()
        if self._dirty:
            self._folder.prune(self._limits.keep, but=self._asked_for())
            saved = self._folder.saved()
            progress = {} if self._progress is None else {"progress": self._progress}
            self._store.note(
                self._lease,
                checkpoints=self._folder.listed(saved),
                attempts=self._attempts,
                **progress,
            )
            self._dirty = False

    def _asked_for(self) -> list[int]:
        """Checkpoints that somebody wants served and that are not converted yet."""
        asked = FinetuneFolder(self._folder.path).conversions()
        return [one.step for one in asked if one.model is None and one.error is None]

    # --- how it ended ---

    def _judge(self, ending: Ending, stopped: VlmqError | None) -> SavedCheckpoint:
        found = checkpoints(self._work)
        last = found[-1] if found else self._resumed
        if ending.status == TrainerExit.TRAINED and self._folder.is_last(last):
            assert last is not None
            self._folder.write_trained(last)
            if stopped is not None:
                raise stopped
            return last
        if stopped is not None:
            raise stopped
        if ending.status == TrainerExit.STOPPED:
            raise Postponed("a worker", delay_s=1, message="Training was stopped from outside")
        if ending.status == TrainerExit.LOSS_BAD:
            raise self._bad_loss(last)
        if ending.status == TrainerExit.DISK_FULL:
            raise self._full_disk(last)
        raise self._crash(ending, last)

    def _bad_loss(self, last: SavedCheckpoint | None) -> LossBad:
        verdict = read_verdict(self._work)
        what = verdict.message if verdict is not None else "the loss is no number"
        return LossBad(f"{what}. {_kept(last)}")

    def _full_disk(self, last: SavedCheckpoint | None) -> Postponed:
        verdict = read_verdict(self._work)
        what = verdict.message if verdict is not None else "the disk is full"
        return Postponed(
            "space on the disk of its checkpoints",
            delay_s=DISK_RETRY_S,
            message=f"Training waits for disk space: {what}. {_kept(last)} Free some space, and it "
            "goes on from there by itself",
        )

    def _crash(self, ending: Ending, last: SavedCheckpoint | None) -> VlmqError:
        broken = self._why_broken()
        if broken is not None:
            return broken
        if shutil.disk_usage(self._work).free < (last.size_bytes if last else MIB):
            return self._full_disk(last)  # so full that the trainer could not even say so
        words = f"training died ({ending.words})"
        if ending.status == TrainerExit.TRAINED:
            words = "training ended before its last step"
        quoted = quote(self._log_file)
        if self._attempts + 1 >= self._limits.max_attempts:
            return TrainingCrashed(
                f"{words}, for the {ordinal(self._attempts + 1)} time in a row without a new "
                f"checkpoint. {_kept(last)} The end of its log:\n{quoted}"
            )
        return Postponed(
            "a worker, after a crash",
            delay_s=min(30.0, 2.0**self._attempts),
            counts=True,
            message=f"{words[0].upper()}{words[1:]}; {_goes_on(last)}. The end of its log:\n{quoted}",
        )


def untold(folder: JobFolder, told: int, until: SavedCheckpoint) -> list[Metric]:
    """What attempts did after the step ``told``, up to a checkpoint, and nobody lived to tell."""
    found: dict[int, Metric] = {}
    for work in folder.attempts():
        for metric in ProgressReader(work, after_step=told).new():
            if metric.step <= until.step:
                found[metric.step] = metric
    return [found[step] for step in sorted(found)]


def event_of(metric: Metric) -> NewEvent:
    """A metric as an event of the job."""
    data = {
        "step": metric.step,
        "total_steps": metric.total_steps,
        "epoch": round(metric.epoch, 4),
        "train_loss": metric.loss,
        "learning_rate": metric.learning_rate,
        "samples_per_s": round(metric.samples_per_s, 4),
        "eta_s": round(metric.eta_s, 1),
    }
    left = metric.total_steps - metric.step
    if left > 0:
        data[STEP_SECONDS] = metric.eta_s / left
    shown = "no number" if metric.loss is None else f"{metric.loss:.4f}"
    return NewEvent(
        f"Step {metric.step}/{metric.total_steps}: training loss {shown}",
        level="info" if metric.loss is not None else "warn",
        type="metrics",
        data=data,
    )


def quote(log_file: Path, lines: int = QUOTED_LINES) -> str:
    """The last lines of a log, for people."""
    return "\n".join(f"| {line}" for line in tail(log_file, lines)) or "| (it is empty)"


def ordinal(number: int) -> str:
    """``number`` as 1st, 2nd, 3rd, 4th."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number // 10 % 10 != 1 else 0, "th")
    return f"{number}{ending}"


def _kept(last: SavedCheckpoint | None) -> str:
    if last is None:
        return "It had saved no checkpoint."
    return f"The checkpoint of step {last.step} is kept."


def _goes_on(last: SavedCheckpoint | None) -> str:
    return "it begins anew" if last is None else f"it goes on from step {last.step}"


def progress_of(metric: Metric) -> Progress:
    """A metric as the job's progress."""
    return Progress(
        step=metric.step,
        total_steps=metric.total_steps,
        epoch=metric.epoch,
        loss=metric.loss,
        learning_rate=metric.learning_rate,
        samples_per_s=metric.samples_per_s,
        eta_s=metric.eta_s,
    )
