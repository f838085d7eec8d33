"""The stages of a fine-tune, each of which leaves something whole behind.

Whoever claims a job goes through them in order and passes over those whose result is there. A stage
ends by returning, or by an exception that says what becomes of the job: Postponed (given back and
tried again), StopWanted and Draining (stopped in good order), LeaseLost (somebody else's now), any
other VlmqError (the job fails with its code and words).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.errors import (
    ConversionFailed,
    InvalidValue,
    NotEnoughDisk,
    QueueUnavailable,
    TrainingConfigInvalid,
    TrainingDataGone,
    VlmqError,
)
from shared.finetune_store import FinetuneLease, NewEvent
from shared.finetunes import FinetuneState, Stage
from shared.settings import Settings
from shared.stores import Stores
from workers import devices
from workers.keeper import until_answered
from workers.training import provenance, registering
from workers.training.attempt import (
    DISK_RETRY_S,
    Attempt,
    AttemptLimits,
    Postponed,
    event_of,
    progress_of,
    quote,
    untold,
)
from workers.training.compare import compare
from workers.training.config import Resolved
from workers.training.data_inputs import prepare_job
from workers.training.data_report import DataReport
from workers.training.gpulocks import GpuLocks, LentGpus, Taken
from workers.training.holding import Holding
from workers.training.job_folder import JobFolder
from workers.training.libraries import interpreter, versions
from workers.training.orders import ConvertJob, write_order
from workers.training.plan import (
    Base,
    Plan,
    config_of,
    config_text,
    find_base,
    find_report,
    look_at_hardware,
    model_path,
    resolve_job,
    write_plan,
)
from workers.training.process import SUPERVISOR_GRACE_S, Ending, TrainingProcess, end_earlier
from workers.training.saved import SavedCheckpoint, checkpoint_at

GPU_RETRY_S = 5.0
ENGINES_RETRY_S = 60.0
_POLL_S = 0.1
_CONFIG_TRY_S = 120.0

T = TypeVar("T")


@dataclass(frozen=True)
class Shop:
    """What every job of this worker shares."""

    settings: Settings
    stores: Stores
    gpus: GpuLocks


class Stages:
    """One claimed job on its way. ``done_training`` is called when it needs no GPU any more."""

    def __init__(
        self,
        shop: Shop,
        lease: FinetuneLease,
        holding: Holding,
        done_training: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = shop.settings
        self._stores = shop.stores
        self._store = shop.stores.finetunes
        self._gpus = shop.gpus
        self._lease = lease
        self._spec = lease.job
        self._holding = holding
        self._done_training = done_training
        self._folder = JobFolder(self._store.path(lease.job_id))
        self._running = False

    # --- validate ------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check rows, images, recipe and configuration, before any GPU is taken."""
        base = find_base(self._stores, self._spec.model)
        report = prepare_job(self._spec, self._stores, base.path, self._holding.check)
        if not report.held_out:
            raise InvalidValue(
                "no row is held out, so nothing could show that the tuned model answers: give a "
                "validation_file or a held_out_share above 0, and at least two different images",
                param="held_out_share",
            )
        resolved = resolve_job(self._spec, report, base, self._expected_hardware())
        config = config_text(self._spec, self._stores, resolved, base, self._folder)
        if self._spec.config_file is not None:
            self._require_right()
            self._try_config(config)
        self._answered(
            lambda: self._store.move(
                self._lease,
                FinetuneState.QUEUED,
                message=_words_of_data(report, resolved),
                level="warn" if report.dropped else "info",
                stage="train",
                data_report=msgspec.to_builtins(report),
                resolved=msgspec.to_builtins(resolved),
            )
        )

    def _expected_hardware(self) -> Any:
        """As many GPUs as were asked for, those with the least memory; they are not taken yet."""
        gpus = self._settings.finetune.gpus[: self._spec.recipe.gpus]
        return look_at_hardware(gpus, self._folder, self._settings.storage.min_free_bytes)

    def _require_right(self) -> None:
        if self._spec.owner not in self._settings.finetune.config_owners:
            raise TrainingConfigInvalid(
                "a configuration is code, and this worker runs none of this owner's (the setting "
                "finetune.config_owners)",
                param="config_file",
            )

    def _try_config(self, config: str) -> None:
        """Import the owner's configuration once, as the trainer will."""
        path = self._folder.path / "tried_config.py"
        path.write_text(config, encoding="utf-8")
        log = self._folder.path / "tried_config.log"
        log.unlink(missing_ok=True)
        ending = self._supervised(
            f"{self._lease.job_id}/config",
            ["-m", "workers.training.try_config", str(path)],
            log,
            limit_s=_CONFIG_TRY_S,
        )
        if ending.status != 0:
            raise TrainingConfigInvalid(
                f"it cannot be imported ({ending.words}):\n{quote(log)}", param="config_file"
            )

    # --- train ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train, convert, compare and register: from the first of these that is not done."""
        end_earlier(
            self._lease.job_id,
            wait_s=self._settings.finetune.stop_s + SUPERVISOR_GRACE_S,
            keep_going=self._holding.check,
        )
        self._folder.discard_halves(self._lease.token)
        self._catch_up()
        trained = self._folder.trained()
        if trained is None and not self._folder.model.is_dir():
            trained = self._train()
        if not self._folder.model.is_dir():
            assert trained is not None
            self._begin("convert", "Training is done; the model is being converted")
            self._convert(trained, self._folder.model, self._lease.job_id)
        self._done_training()
        if not self._folder.metrics.exists():
            self._begin("compare", "The tuned model answers the held-out rows, beside its base")
            self._compare()
        self._begin("register", "The tuned model is being registered")
        self._register(trained)

    def _train(self) -> SavedCheckpoint:
        base = find_base(self._stores, self._spec.model)
        report = find_report(self._folder)
        resume = self._folder.newest()
        self._require_servable()
        lent = self._take_gpus()
        try:
            process, attempt = self._start(base, report, resume, lent)
        finally:
            lent.close()  # by now the supervisor has them, or nobody needs them
        return attempt.run(process)

    def _require_servable(self) -> None:
        """Train for nothing that engines have shown they cannot serve. Raises: Postponed."""
        model = self._spec.model
        refusal = self._answered(lambda: self._stores.presence.refusal(model))
        if refusal is not None:
            raise Postponed(
                f"an engine that can serve {model} ({refusal})", delay_s=ENGINES_RETRY_S
            )

    def _catch_up(self) -> None:
        """Tell what earlier attempts got done and nobody lived to tell."""
        newest = self._folder.newest()
        if newest is None:
            return
        metrics = untold(self._folder, self._spec.progress.step, newest)
        fields: dict[str, Any] = {"checkpoints": self._folder.listed(self._folder.saved())}
        if metrics:
            fields["progress"] = progress_of(metrics[-1])
            self._answered(lambda: self._store.add_events(self._lease, map(event_of, metrics)))
        if newest.step not in {one.step for one in self._spec.checkpoints}:
            fields["attempts"] = 0  # whoever saved it did not die in vain
            self._lease = msgspec.structs.replace(self._lease, attempts=0)
        self._answered(lambda: self._store.note(self._lease, **fields))

    def _take_gpus(self) -> LentGpus:
        wanted = self._spec.recipe.gpus if self._settings.finetune.gpus else 0
        lent = self._gpus.take(wanted, self._lease.job_id)
        if isinstance(lent, Taken):
            raise Postponed(
                f"{wanted} GPU{'s' if wanted > 1 else ''}: {lent.words}", delay_s=GPU_RETRY_S
            )
        try:
            if lent.gpus:
                waiting_for = f"engines to leave GPU {lent.visible}"
                self._answered(lambda: self._store.note(self._lease, waiting_for=waiting_for))
            left = self._gpus.wait_until_free(
                lent,
                wait_s=self._settings.finetune.lend_wait_s,
                keep_going=self._holding.check,
            )
        except BaseException:
            lent.close()
            raise
        if left:
            lent.close()
            raise Postponed(
                f"engines that did not leave GPU {', '.join(left)} within finetune.lend_wait_s",
                delay_s=ENGINES_RETRY_S,
            )
        return lent

    def _start(
        self, base: Base, report: DataReport, resume: SavedCheckpoint | None, lent: LentGpus
    ) -> tuple[TrainingProcess, Attempt]:
        settings = self._settings
        resolved = self._resolved(report, base, lent, resume)
        config = config_text(self._spec, self._stores, resolved, base, self._folder)
        plan = write_plan(
            self._lease.token,
            self._folder,
            base,
            resolved,
            config,
            resume=resume,
            cache=settings.run_dir / "training",
            min_free_bytes=settings.storage.min_free_bytes,
        )
        python = interpreter(settings.finetune.python)
        attempt = provenance.new_attempt(
            self._lease.token, self._lease.worker, lent.gpus, resume, config, versions(python)
        )
        provenance.record_attempt(self._folder, self._spec, base, report, resolved, attempt)
        self._run_from(
            "train",
            _words_of_start(resolved, lent, resume),
            resolved=msgspec.to_builtins(resolved),
        )
        process = TrainingProcess(
            (python, "-m", "workers.training.trainer", str(plan.order)),
            name=self._lease.job_id,
            run_dir=settings.run_dir,
            log=plan.log,
            stop_s=settings.finetune.stop_s,
            environment=devices.environment(lent.visible),
            hold=lent.locks,
        )
        return process, self._watched(plan, resume)

    def _watched(self, plan: Plan, resume: SavedCheckpoint | None) -> Attempt:
        return Attempt(
            self._lease,
            self._store,
            self._holding,
            self._folder,
            AttemptLimits(
                keep=plan.resolved.keep_checkpoints,
                max_attempts=self._settings.finetune.max_attempts,
            ),
            log_file=plan.log,
            resumed=resume,
            why_broken=self._why_broken,
        )

    def _resolved(
        self, report: DataReport, base: Base, lent: LentGpus, resume: SavedCheckpoint | None
    ) -> Resolved:
        min_free = self._settings.storage.min_free_bytes
        hardware = look_at_hardware(lent.gpus, self._folder, min_free)
        try:
            return resolve_job(self._spec, report, base, hardware)
        except NotEnoughDisk as error:
            if resume is None:
                raise  # nothing is lost yet, and to wait would hide it
            raise Postponed(error.message, delay_s=DISK_RETRY_S) from None

    def _why_broken(self) -> VlmqError | None:
        """What was taken away from under the trainer, if that explains its death."""
        try:
            find_base(self._stores, self._spec.model)
            report = find_report(self._folder)
        except VlmqError as error:
            return error
        there = sum(1 for path in self._folder.images.rglob("*") if path.is_file())
        if there < report.images:
            return TrainingDataGone(
                f"{report.images - there} of the job's {report.images} images were removed from "
                f"{self._folder.images} while it ran; create the job again"
            )
        return None

    # --- convert, compare, register ------------------------------------------------------------

    def convert_checkpoint(self, step: int) -> str:
        """Convert one checkpoint and have it served; answers its model's name.

        Raises: ConversionFailed, BaseModelGone, and what ends a stage.
        """
        found = next((one for one in self._folder.saved() if one.step == step), None)
        if found is None:
            raise ConversionFailed(
                f"the checkpoint of step {step} was deleted to make room for later ones; choose a "
                "later one, or a larger keep_checkpoints"
            )
        out = self._folder.path / "checkpoints" / str(step)
        if not out.is_dir():
            self._convert(found, out, f"{self._lease.job_id}/{step}")
        return registering.link_checkpoint(self._stores, self._spec, step, out)

    def _convert(self, checkpoint: SavedCheckpoint, out: Path, name: str) -> None:
        end_earlier(name, wait_s=0, keep_going=self._holding.check)
        base = find_base(self._stores, self._spec.model)
        orders = checkpoint.path.parent / "order"
        order = orders / f"convert-{out.name}.json"
        log = orders / f"convert-{out.name}.log"
        out.parent.mkdir(mode=0o700, exist_ok=True)
        write_order(
            order,
            ConvertJob(
                config=str(config_of(checkpoint)),
                checkpoint=str(checkpoint.path),
                base=str(base.path),
                model_path=str(model_path(base, self._folder)),
                out=str(out),
            ),
        )
        log.unlink(missing_ok=True)
        ending = self._supervised(name, ["-m", "workers.training.convert", str(order)], log)
        if ending.status == 0 and out.is_dir():
            return
        if checkpoint_at(checkpoint.path) is None:
            raise ConversionFailed(f"the checkpoint {checkpoint.path.name} is not whole any more")
        words = f"the conversion died ({ending.words}). The end of its log:\n{quote(log)}"
        if self._lease.attempts + 1 >= self._settings.finetune.max_attempts:
            raise ConversionFailed(words)
        raise Postponed("a worker, after a crash", delay_s=2, counts=True, message=words)

    def _compare(self) -> None:
        registering.link_candidate(self._stores, self._spec, self._folder.model)
        comparison = compare(
            self._spec, self._stores, self._folder.path, self._holding.check, self._tell_waiting
        )
        rows = comparison.rows
        words = (
            f"Of {rows} held-out rows the tuned model answers {comparison.tuned.exact_match:.0%} "
            f"exactly as the reference, its base {comparison.base.exact_match:.0%}"
        )
        event = NewEvent(words, data={"comparison": msgspec.to_builtins(comparison)})
        self._answered(lambda: self._store.add_events(self._lease, [event]))

    def _register(self, trained: SavedCheckpoint | None) -> None:
        results = self._answered(
            lambda: registering.publish_results(self._stores, self._spec, self._folder)
        )
        if trained is not None:
            provenance.record_end(self._folder, trained)
        name = self._spec.tuned_name
        self._stores.models.publish(name)
        self._answered(
            lambda: self._store.move(
                self._lease,
                FinetuneState.SUCCEEDED,
                message=f"The tuned model answers as {name}",
                fine_tuned_model=name,
                result_files=results,
                trained_tokens=self._trained_tokens(trained),
            )
        )

    def _trained_tokens(self, trained: SavedCheckpoint | None) -> int | None:
        """The tokens of all rows by how often training saw them; None for a recipe of one's own."""
        if trained is None or self._spec.config_file is not None:
            return None
        report = find_report(self._folder)
        epochs = self._spec.resolved.get("n_epochs")
        return None if epochs is None else report.train_tokens * int(epochs)

    # --- ground --------------------------------------------------------------------------------

    def _begin(self, stage: Stage, message: str) -> None:
        """Say that a stage begins; a job that was taken over for it is running from here on."""
        if not self._running:
            self._run_from(stage, message)
            return
        self._answered(lambda: self._store.add_events(self._lease, [NewEvent(message)]))
        self._answered(lambda: self._store.note(self._lease, stage=stage))

    def _run_from(self, stage: Stage, message: str, **fields: Any) -> None:
        self._answered(
            lambda: self._store.move(
                self._lease, FinetuneState.RUNNING, message=message, stage=stage, **fields
            )
        )
        self._running = True

    def _tell_waiting(self, waiting_for: str | None) -> None:
        try:
            self._store.note(self._lease, waiting_for=waiting_for)
        except QueueUnavailable:
            return  # only for people to see, and told again

    def _supervised(
        self, name: str, words: Sequence[str], log: Path, *, limit_s: float = float("inf")
    ) -> Ending:
        """Run a command of the training interpreter, without a GPU, to its end."""
        process = TrainingProcess(
            (interpreter(self._settings.finetune.python), *words),
            name=name,
            run_dir=self._settings.run_dir,
            log=log,
            stop_s=0,
            environment=devices.environment(""),
        )
        stopped: VlmqError | None = None
        until = time.monotonic() + limit_s
        while not process.ended():
            try:
                if stopped is None:
                    self._holding.check()
            except VlmqError as error:
                stopped = error
            if stopped is not None or time.monotonic() > until:
                process.kill()
            time.sleep(_POLL_S)
        ending = process.status()
        if stopped is not None:
            raise stopped
        return ending

    def _answered(self, call: Callable[[], T]) -> T:
        """Do ``call`` again until Redis answers, unless the lease is lost or the worker stops."""
        return until_answered(call, self._holding.check_held)


def _words_of_data(report: DataReport, resolved: Resolved) -> str:
    dropped = sum(report.dropped.values())
    words = f"The data is good: {report.train:,} rows to learn from, {report.held_out:,} held out"
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        words = f"{words}; {dropped:,} of {report.rows:,} were dropped ({reasons})"
    return (
        f"{words}. Training will take {resolved.total_steps:,} steps of {resolved.batch_size} "
        f"samples, and up to {_size(resolved.disk_bytes)} on disk"
    )


def _words_of_start(resolved: Resolved, lent: LentGpus, resume: SavedCheckpoint | None) -> str:
    where = f"GPU {lent.visible}" if lent.gpus else "the processor"
    begins = f"goes on from step {resume.step} of" if resume else "begins:"
    return (
        f"Training {begins} {resolved.total_steps:,} steps of {resolved.batch_size} samples on "
        f"{where}, learning rate {resolved.learning_rate:g}"
    )


def _size(size_bytes: int) -> str:
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
