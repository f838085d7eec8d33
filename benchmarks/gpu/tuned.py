"""Our own training of the same recipe: what the project chooses, with what ``--set`` changes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.gpu_samples import memory_bytes
from benchmarks.gpu.stock import SEED, Tutorial
from benchmarks.gpu.training_data import Rows
from shared.errors import ConfigurationError
from shared.finetunes import Recipe
from workers.training.base_facts import LLM_TARGETS, BaseFacts, read_base_facts
from workers.training.config import (
    Hardware,
    Resolved,
    TrainingPaths,
    deepspeed_file,
    fill,
    render,
    resolve,
)
from workers.training.orders import ConvertJob, Speed, TrainerJob, write_order

_TEXT_TOKENS = 96  # question, answer and what stands around them
_PARTS = ("recipe", "resolved", "speed", "config")


class Variant(msgspec.Struct, frozen=True):
    """Changes to what is chosen by itself, by part.

    ``recipe`` is asked for, ``resolved`` and ``speed`` replace what was chosen, ``config`` replaces
    settings of the rendered configuration, ``micro`` is samples per GPU and iteration.
    """

    name: str
    gpus: int = 1
    micro: int | None = None
    recipe: dict[str, Any] = {}
    resolved: dict[str, Any] = {}
    speed: dict[str, Any] = {}
    config: dict[str, Any] = {}

    def changed(self, key: str, value: Any) -> Variant:
        """With one change. Raises: ConfigurationError for a key that is none."""
        part, _, field = key.rpartition(".")
        if part in _PARTS:
            changes = {**getattr(self, part), field: value}
            return msgspec.structs.replace(self, **{part: changes})
        if key in ("gpus", "micro"):
            return msgspec.structs.replace(self, **{key: value})
        raise ConfigurationError(
            f"--set {key}: write gpus, micro, or PART.FIELD with a part of {', '.join(_PARTS)}"
        )


class Ordered(msgspec.Struct, frozen=True):
    """A training that is ready to start."""

    command: list[str]
    work: Path
    config: Path
    resolved: Resolved
    speed: Speed


def order(
    variant: Variant, folder: Path, model: Path, rows: Rows, tutorial: Tutorial, *, cpu: bool
) -> Ordered:
    """Resolve, render and write what the trainer is given. Raises: ConfigurationError."""
    base, gpus = read_base_facts(model), 0 if cpu else variant.gpus
    try:
        resolved = _resolved(variant, base, rows, tutorial, gpus, folder)
        speed = _speed(variant, resolved, folder)
        text = fill(
            render(resolved, TrainingPaths(model, rows.file, rows.images)),
            {"log_iterations": 1, **variant.config},
        )
    except (TypeError, KeyError) as error:
        raise ConfigurationError(f"--set {variant.name}: no such field: {error}") from None
    config, work = folder / f"{variant.name}.py", folder / f"{variant.name}.work"
    config.write_text(text, encoding="utf-8")
    job = folder / f"{variant.name}.job.json"
    write_order(
        job,
        TrainerJob(
            config=str(config),
            work_dir=str(work),
            deepspeed=str(deepspeed_file(resolved.deepspeed)),
            base=str(model),
            model_path=str(model),
            seed=resolved.seed,
            gpus=gpus,
            speed=speed,
            cache_dir=str(folder / "cache"),
        ),
    )
    command = [sys.executable, "-m", "workers.training.trainer", str(job)]
    return Ordered(command, work, config, resolved, speed)


def convert_command(folder: Path, config: Path, checkpoint: Path, model: Path) -> list[str]:
    """Our conversion to the official folder ``folder / "tuned"``."""
    job = folder / "convert.job.json"
    out = folder / "tuned"
    write_order(
        job,
        ConvertJob(
            config=str(config),
            checkpoint=str(checkpoint),
            base=str(model),
            model_path=str(model),
            out=str(out),
        ),
    )
    return [sys.executable, "-m", "workers.training.convert", str(job)]


def like_stock(tutorial: Tutorial, iterations: int) -> Variant:
    """Stock's batches, warm-up and targets with our speed: its losses are to be stock's.

    Left to itself xtuner puts LoRA on the head, too; by default we do not.
    """
    return Variant(
        "curve",
        micro=tutorial.batch_size,
        config={
            "llm_targets": [*LLM_TARGETS["internlm2"], "output"],
            "warmup_iterations": int(tutorial.warmup_ratio * iterations),
            "total_iterations": iterations,
        },
    )


def _resolved(
    variant: Variant, base: BaseFacts, rows: Rows, tutorial: Tutorial, gpus: int, folder: Path
) -> Resolved:
    asked: dict[str, Any] = {
        "n_epochs": 1,
        "learning_rate": tutorial.lr,
        "warmup_ratio": tutorial.warmup_ratio,
        "save_every": rows.count,  # at the end alone
        "gpus": variant.gpus,
        **variant.recipe,
    }
    resolved = resolve(
        msgspec.convert(asked, Recipe),
        rows=rows.count,
        longest_tokens=base.max_tiles * base.tokens_per_tile + _TEXT_TOKENS,
        seed=SEED,
        base=base,
        hardware=Hardware(
            gpus=gpus,
            memory_bytes=memory_bytes() if gpus else _main_memory(),
            cores=os.cpu_count() or 1,
            free_disk_bytes=shutil.disk_usage(folder).free,
        ),
    )
    if variant.micro is not None:
        each = resolved.micro_batch_size * resolved.accumulation
        resolved = msgspec.structs.replace(
            resolved, micro_batch_size=variant.micro, accumulation=max(1, each // variant.micro)
        )
    return msgspec.structs.replace(resolved, **variant.resolved)


def _speed(variant: Variant, resolved: Resolved, folder: Path) -> Speed:
    changes = dict(variant.speed)
    if changes.get("cached_features") is True:
        changes["cached_features"] = str(folder / f"{variant.name}.features")
    chosen = Speed(
        attention=resolved.attention, gradient_checkpointing=resolved.gradient_checkpointing
    )
    return msgspec.structs.replace(chosen, **changes)


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
