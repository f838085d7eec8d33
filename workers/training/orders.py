"""What the consumer orders from the training interpreter, and how those programs answer.

Both programs, ``workers.training.trainer`` and ``workers.training.convert``, get one JSON file and
answer by their exit status; this module is what the two sides share, and needs no model library.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from shared.storage import write_json

VERDICT = "verdict.json"
"""In the work folder: why training ended before its time, if it was not stopped or killed."""
RUN = "run.json"
"""In the work folder: what its numbers mean, written before the first step."""


class TrainerExit(enum.IntEnum):
    """How a trainer ends. Any other status, or a signal, is a crash."""

    TRAINED = 0
    """To the end; the last checkpoint is saved."""
    STOPPED = 64
    """As it was asked to, with a checkpoint of the last whole step, if there was one."""
    LOSS_BAD = 65
    """The loss is no number or grows for good; ``verdict.json`` says where."""
    DISK_FULL = 66
    """Too little space for another checkpoint; those before it are whole."""


Attention = Literal["sdpa", "stock"]


class Speed(msgspec.Struct, frozen=True):
    """How the model computes; none of it changes what is learnt beyond rounding."""

    attention: Attention = "sdpa"
    """PyTorch's own attention in place of the eager one of the model's code, or ``stock``."""
    gradient_checkpointing: bool = True
    """Compute activations twice instead of keeping them: less memory, more time."""
    labelled_logits: bool = True
    """Compute the head only where there is a label; the loss is made of nothing else."""
    cached_features: str | None = None
    """Folder for the features of a frozen ViT, computed once before training; None: no cache."""


class Run(msgspec.Struct, frozen=True):
    """``run.json``. An iteration is one micro-batch; a step is one update of the weights."""

    iterations_per_step: int
    total_steps: int
    samples_per_step: int
    steps_per_epoch: float


class TrainerJob(msgspec.Struct, frozen=True, kw_only=True):
    """``python -m workers.training.trainer JOB.json``.

    ``base`` is the checkpoint to be tuned and ``model_path`` what the configuration calls it: a
    copy with code where the base has none (made here), else the base itself. ``gpus`` 0 is the
    processor. ``resume`` is a whole checkpoint of this job, from any attempt.
    """

    config: str
    work_dir: str
    deepspeed: str
    base: str
    model_path: str
    seed: int
    gpus: int = 0
    resume: str | None = None
    speed: Speed = Speed()
    keep_checkpoints: int = 3
    checkpoint_bytes: int = 0
    """What a checkpoint is expected to take; the first one shows what it does take."""
    min_free_bytes: int = 0
    """Space on the disk that no checkpoint may touch."""
    cache_dir: str | None = None
    """Where libraries may keep what they compile; None: below the work folder."""


class ConvertJob(msgspec.Struct, frozen=True, kw_only=True):
    """``python -m workers.training.convert JOB.json``: a checkpoint to the official folder ``out``."""

    config: str
    checkpoint: str
    base: str
    model_path: str
    out: str


class Verdict(msgspec.Struct, frozen=True):
    """``verdict.json``. ``step`` counts optimizer steps; ``checkpoint`` is the last one kept."""

    reason: Literal["nan", "diverged", "disk"]
    message: str
    step: int
    loss: float | None = None
    checkpoint: str | None = None


Order = TypeVar("Order", bound=msgspec.Struct)


def read_order(path: Path, kind: type[Order]) -> Order:
    """Read an order. Raises: OSError, msgspec.ValidationError."""
    return msgspec.json.decode(path.read_bytes(), type=kind)


def write_order(path: Path, order: msgspec.Struct) -> None:
    """Write an order, a run or a verdict; whole or not at all."""
    write_json(path, order)


def read_verdict(work_dir: Path) -> Verdict | None:
    """Why the trainer gave up, if it did."""
    path = work_dir / VERDICT
    return read_order(path, Verdict) if path.is_file() else None
