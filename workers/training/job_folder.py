"""What a fine-tune leaves on shared storage, and which of it is whole.

Below ``finetunes/ID``: ``data/``, ``work/TOKEN/`` of each attempt, ``trained.json``, ``model/``,
``comparison.jsonl``, ``metrics.json``, ``provenance.json``. Whoever takes a job over looks here for
the first stage that is not finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from shared.finetunes import FinetuneCheckpoint
from shared.storage import read_json, remove_tree, write_json
from workers.training.orders import RUN, Run
from workers.training.saved import SavedCheckpoint, checkpoint_at, checkpoints, newest

LEAST_KEPT = 2
"""Checkpoints that are never deleted while training goes on: the last one may be half gone."""


class Trained(msgspec.Struct, frozen=True):
    """``trained.json``: training has gone to its end. ``checkpoint`` is below the job's folder."""

    checkpoint: str
    step: int


class JobFolder:
    """Names and states of things in one folder. Reading may raise StorageFailed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.rows = self.data / "train.json"
        self.images = self.data / "images"
        self.work = path / "work"
        self.model = path / "model"
        self.comparison = path / "comparison.jsonl"
        self.metrics = path / "metrics.json"
        self.provenance = path / "provenance.json"

    def attempt(self, token: int) -> Path:
        """The work folder of the attempt under a fencing token."""
        return self.work / f"{token:010}"

    def attempts(self) -> list[Path]:
        """The work folders of all attempts, oldest first."""
        if not self.work.is_dir():
            return []
        return sorted(path for path in self.work.iterdir() if path.name.isdigit())

    def saved(self) -> list[SavedCheckpoint]:
        """Whole checkpoints of all attempts, by step; of two at one step the later one."""
        found = [one for attempt in self.attempts() for one in checkpoints(attempt)]
        by_step = {one.step: one for one in sorted(found, key=lambda one: one.created_at)}
        return sorted(by_step.values(), key=lambda one: one.step)

    def newest(self) -> SavedCheckpoint | None:
        """The whole checkpoint that is furthest, of all attempts: where the next one begins."""
        return newest(self.attempts())

    def listed(self, saved: Sequence[SavedCheckpoint]) -> list[FinetuneCheckpoint]:
        """Checkpoints as the job's record has them."""
        return [
            FinetuneCheckpoint(
                step=one.step,
                path=str(one.path.relative_to(self.path)),
                created_at=one.created_at,
                metrics={} if one.loss is None else {"train_loss": one.loss},
            )
            for one in saved
        ]

    def prune(self, keep: int, *, but: Collection[int] = ()) -> None:
        """Delete checkpoints of all attempts but the newest ``keep`` and those of steps ``but``.

        Never the last two. Raises: StorageFailed.
        """
        found = [one for attempt in self.attempts() for one in checkpoints(attempt)]
        found.sort(key=lambda one: (one.step, one.created_at))
        for old in found[: -max(keep, LEAST_KEPT)]:
            if old.step not in but:
                remove_tree(old.path)

    def discard_halves(self, token: int) -> None:
        """Delete what attempts before ``token`` began to save and did not finish."""
        for attempt in self.attempts():
            if int(attempt.name) < token:
                for folder in attempt.glob("iter_*.pth"):
                    if checkpoint_at(folder) is None:
                        remove_tree(folder)

    def is_last(self, checkpoint: SavedCheckpoint | None) -> bool:
        """Whether it is of the last step, by the attempt that saved it."""
        run = checkpoint and read_json(checkpoint.path.parent / RUN)
        return (
            checkpoint is not None
            and run is not None
            and checkpoint.step >= msgspec.convert(run, Run).total_steps
        )

    def trained(self) -> SavedCheckpoint | None:
        """The checkpoint at the end of training, if it got there and it is still whole."""
        value = read_json(self.path / "trained.json")
        if value is not None:
            return checkpoint_at(self.path / msgspec.convert(value, Trained).checkpoint)
        newest = self.newest()  # perhaps nobody lived to say that it was the last one
        return newest if self.is_last(newest) else None

    def write_trained(self, checkpoint: SavedCheckpoint) -> None:
        """Training is done."""
        path = str(checkpoint.path.relative_to(self.path))
        write_json(self.path / "trained.json", Trained(path, checkpoint.step))
