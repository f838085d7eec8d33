"""From a recipe to an xtuner configuration: every "auto" chosen, every number checked.

``resolve`` is pure: what was asked for, what the data and the base are, what the machine has.
``render`` puts the result into the template ``configs/training/internvl2.py``.
"""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.errors import InvalidRequest, StorageFull
from shared.finetunes import DeepSpeedStage, Recipe, TuningMethod
from workers.training.base_facts import LLM_TARGETS, VIT_TARGETS, BaseFacts
from workers.training.memory import fits, most_samples
from workers.training.orders import Attention

TUTORIAL_BATCH = 8
TUTORIAL_EPOCHS = 10
LEARNING_RATES: dict[TuningMethod, float] = {
    "lora": 3e-5,
    "qlora": 3e-5,
    # InternVL's own recipe, 4e-5 at 128 samples a step, scaled by the root to the batch of 8.
    "full": 1e-5,
}
WARMUP_RATIO = 0.03
WEIGHT_DECAY = 0.05
CHECKPOINTS_PER_RUN = 10
MOST_STEPS_UNSAVED = 500
MIN_KEPT = 2
"""The newest one may be half written when a trainer dies, and nothing is trained twice."""


class Hardware(msgspec.Struct, frozen=True):
    """What a job gets. ``gpus`` 0 means the processor, ``memory_bytes`` is then the machine's."""

    gpus: int
    memory_bytes: int
    cores: int
    free_disk_bytes: int


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe with nothing left to choose. Steps are optimizer steps, rates per step."""

    method: TuningMethod
    language: Literal["internlm2", "phi3"]
    tuned: tuple[Literal["llm", "vit"], ...]
    n_epochs: int
    batch_size: int
    micro_batch_size: int
    """Samples per GPU and iteration."""
    accumulation: int
    """Iterations per step."""
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    steps_per_epoch: int
    total_steps: int
    save_every: int
    keep_checkpoints: int
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    max_length: int
    deepspeed: DeepSpeedStage
    gpus: int
    seed: int
    gradient_checkpointing: bool
    attention: Attention
    data_workers: int
    trained_parameters: int
    checkpoint_bytes: int
    disk_bytes: int
    """Needed at once: checkpoints, one being written, and the tuned model."""


class TrainingPaths(msgspec.Struct, frozen=True):
    """Where a job's configuration points."""

    model_path: Path
    data_path: Path
    image_folder: Path


def resolve(
    recipe: Recipe,
    *,
    rows: int,
    longest_tokens: int | None,
    seed: int,
    base: BaseFacts,
    hardware: Hardware,
) -> Resolved:
    """Choose whatever the recipe leaves open. ``longest_tokens`` is that of the longest row.

    Raises: InvalidRequest naming the field, StorageFull.
    """
    _check(recipe, rows, base, hardware)
    processes = max(1, hardware.gpus)
    trained = trained_parameters(recipe, base)
    batch = _batch(recipe, rows, processes)
    per_process = batch // processes
    tokens = min(longest_tokens or base.max_tiles * base.tokens_per_tile + 256, recipe.max_length)
    checkpointing, most = _memory(recipe, base, hardware, trained, tokens, per_process)
    micro = max(size for size in range(1, most + 1) if per_process % size == 0)
    steps_per_epoch = math.ceil(rows / batch)
    epochs = recipe.n_epochs or TUTORIAL_EPOCHS
    total = steps_per_epoch * epochs
    checkpoint_bytes = checkpoint_size(trained)
    disk = (recipe.keep_checkpoints + 1) * checkpoint_bytes + base.weights_bytes
    _require_disk(disk, hardware)
    rate = recipe.learning_rate or LEARNING_RATES[recipe.method]
    return Resolved(
        method=recipe.method,
        language=base.language,
        tuned=recipe.lora_targets,
        n_epochs=epochs,
        batch_size=batch,
        micro_batch_size=micro,
        accumulation=per_process // micro,
        learning_rate=rate * (recipe.learning_rate_multiplier or 1.0),
        weight_decay=WEIGHT_DECAY if recipe.weight_decay is None else recipe.weight_decay,
        warmup_steps=_warmup(recipe, total, per_process // micro),
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        save_every=recipe.save_every
        or min(MOST_STEPS_UNSAVED, math.ceil(total / CHECKPOINTS_PER_RUN)),
        keep_checkpoints=recipe.keep_checkpoints,
        lora_rank=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        max_length=recipe.max_length,
        deepspeed=recipe.deepspeed,
        gpus=hardware.gpus,
        seed=seed,
        gradient_checkpointing=checkpointing,
        attention="sdpa",
        data_workers=_workers(hardware, processes),
        trained_parameters=trained,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=disk,
    )


def trained_parameters(recipe: Recipe, base: BaseFacts) -> int:
    """How many numbers are learnt: the projector's always, and those of the parts that are tuned."""
    count = base.projector_parameters
    for name, tower in (("llm", base.llm), ("vit", base.vit)):
        if name not in recipe.lora_targets:
            continue
        if recipe.method == "full":
            count += tower.parameters
        else:
            shapes = [shape for found in tower.shapes.values() for shape in found]
            count += sum(recipe.lora_rank * (out + given) for out, given in shapes)
    return count


def checkpoint_size(trained: int) -> int:
    """Bytes of a checkpoint: bfloat16 weights, and their float32 copy and two moments."""
    return trained * (2 + 4 + 4 + 4) + (1 << 20)


def render(resolved: Resolved, paths: TrainingPaths) -> str:
    """The text of a configuration for this job: the template with its settings replaced."""
    accumulation = resolved.accumulation
    return fill(
        training_template().read_text(encoding="utf-8"),
        {
            "model_path": str(paths.model_path),
            "data_path": str(paths.data_path),
            "image_folder": str(paths.image_folder),
            "language": resolved.language,
            "tuned": list(resolved.tuned),
            "method": resolved.method,
            "lora_rank": resolved.lora_rank,
            "lora_alpha": resolved.lora_alpha,
            "lora_dropout": resolved.lora_dropout,
            "llm_targets": list(LLM_TARGETS[resolved.language]),
            "vit_targets": list(VIT_TARGETS),
            "max_length": resolved.max_length,
            "batch_size": resolved.micro_batch_size,
            "accumulative_counts": accumulation,
            "num_workers": resolved.data_workers,
            "max_epochs": resolved.n_epochs,
            "lr": resolved.learning_rate,
            "weight_decay": resolved.weight_decay,
            "warmup_iterations": resolved.warmup_steps * accumulation,
            "total_iterations": resolved.total_steps * accumulation,
            "save_iterations": resolved.save_every * accumulation,
            "keep_checkpoints": resolved.keep_checkpoints,
            "log_iterations": _log_every(resolved) * accumulation,
            "seed": resolved.seed,
            "backend": "nccl" if resolved.gpus else "gloo",
        },
    )


def fill(template: str, values: dict[str, Any]) -> str:
    """Replace the right-hand sides of top-level assignments. Raises: KeyError for an unknown name."""
    lines = template.splitlines(keepends=True)
    places = {
        node.targets[0].id: node.value
        for node in ast.parse(template).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for name, value in values.items():
        place = places[name]
        assert place.lineno == place.end_lineno, f"{name} must stand on one line"
        line = lines[place.lineno - 1].encode()
        lines[place.lineno - 1] = (
            line[: place.col_offset] + repr(value).encode() + line[place.end_col_offset :]
        ).decode()
    return "".join(lines)


def training_template() -> Path:
    """The template, beside the sources or where the wheel puts it."""
    return _shipped("training/internvl2.py")


def deepspeed_file(stage: DeepSpeedStage) -> Path:
    """DeepSpeed's settings for a stage."""
    return _shipped(f"deepspeed/{stage}.json")


def _shipped(name: str) -> Path:
    beside = Path(__file__).parents[2] / "configs" / name
    return beside if beside.is_file() else Path(sys.prefix) / "share/vlmq/configs" / name


# --- choices -------------------------------------------------------------------------------------


def _batch(recipe: Recipe, rows: int, processes: int) -> int:
    if recipe.batch_size is not None:
        return recipe.batch_size
    wanted = min(TUTORIAL_BATCH, rows)
    return max(processes, math.ceil(wanted / processes) * processes)


def _warmup(recipe: Recipe, total: int, accumulation: int) -> int:
    """Steps of warm-up. One iteration would leave the rate at its start for the whole run."""
    ratio = WARMUP_RATIO if recipe.warmup_ratio is None else recipe.warmup_ratio
    steps = min(round(ratio * total), total - 1)
    return steps if steps * accumulation > 1 else 0


def _memory(
    recipe: Recipe,
    base: BaseFacts,
    hardware: Hardware,
    trained: int,
    tokens: int,
    per_process: int,
) -> tuple[bool, int]:
    """Whether to checkpoint gradients, and the most samples per iteration that then fit."""
    asked = False if _is_kept_whole(recipe, base) else recipe.gradient_checkpointing
    for checkpointing in (False, True) if asked is None else (asked,):
        most = most_samples(
            recipe, base, hardware.memory_bytes, hardware.gpus, trained, tokens,
            checkpointing=checkpointing,
        )  # fmt: skip
        if fits(most):
            return checkpointing, min(most, per_process)
    if asked is None:
        # The estimate is a cautious one, so it does not keep anybody from trying.
        return True, 1
    return asked, 1


def _is_kept_whole(recipe: Recipe, base: BaseFacts) -> bool:
    """This project's own network checkpoints gradients in torch's newer way, which zero3 breaks."""
    return recipe.deepspeed.startswith("zero3") and not base.has_code


def _workers(hardware: Hardware, processes: int) -> int:
    """Loading processes per training process; none where they would take cores from training."""
    return min(8, max(2, hardware.cores // processes - 1)) if hardware.gpus else 0


def _log_every(resolved: Resolved) -> int:
    """Steps between two metrics: about a thousand in a run, never more than ten apart."""
    return max(1, min(10 // resolved.accumulation, resolved.total_steps // 100))


# --- checks --------------------------------------------------------------------------------------


def _check(recipe: Recipe, rows: int, base: BaseFacts, hardware: Hardware) -> None:
    processes = max(1, hardware.gpus)
    if rows < processes:
        _refuse("training_file", f"{rows} usable rows are too few for {processes} GPUs; add some")
    if not recipe.lora_targets:
        _refuse("lora_targets", 'nothing is to be tuned; name "llm", "vit" or both')
    if recipe.keep_checkpoints < MIN_KEPT:
        _refuse("keep_checkpoints", f"at least {MIN_KEPT} are kept while training")
    if recipe.batch_size is not None and (recipe.batch_size < 1 or recipe.batch_size % processes):
        _refuse("batch_size", f"{recipe.batch_size} is no multiple of the {processes} GPUs")
    for name in ("n_epochs", "save_every", "lora_rank", "lora_alpha", "max_length"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            _refuse(name, f"must be at least 1, not {value}")
    for name in ("learning_rate", "learning_rate_multiplier"):
        value = getattr(recipe, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            _refuse(name, f"must be a number above 0, not {value}")
    if recipe.warmup_ratio is not None and not 0 <= recipe.warmup_ratio < 1:
        _refuse("warmup_ratio", f"must be at least 0 and below 1, not {recipe.warmup_ratio}")
    if recipe.max_length > base.context:
        _refuse("max_length", f"{recipe.max_length} is beyond the model's {base.context} tokens")
    if recipe.gradient_checkpointing and _is_kept_whole(recipe, base):
        _refuse("gradient_checkpointing", "does not go with zero3 for this model; use zero2")
    if recipe.method == "qlora":
        if not hardware.gpus:
            _refuse("method", "qlora needs a GPU; use lora here")
        if recipe.deepspeed.startswith("zero3"):
            _refuse("deepspeed", "quantized weights cannot be split by zero3; use zero2")


def _require_disk(needed: int, hardware: Hardware) -> None:
    if needed > hardware.free_disk_bytes:
        raise StorageFull(
            f"checkpoints and the tuned model need {needed >> 20} MiB and "
            f"{hardware.free_disk_bytes >> 20} MiB are free; free some, or lower keep_checkpoints"
        )


def _refuse(field: str, why: str) -> None:
    raise InvalidRequest(f"{field}: {why}", param=field)
