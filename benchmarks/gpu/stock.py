"""Stock training: xtuner's own program and the configuration it ships, edited as the tutorial does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

from benchmarks.gpu.published import xtuner_folder
from benchmarks.gpu.training_data import Rows
from benchmarks.gpu.training_process import free_port

_SHIPPED = "configs/internvl/v2/internvl_v2_internlm2_2b_lora_finetune.py"
_CONVERTER = "configs/internvl/v1_5/convert_to_official.py"
_ZERO2 = "configs/deepspeed/deepspeed_zero2.json"
SEED = 20260725

Setting = str | int | float


class Tutorial(msgspec.Struct, frozen=True):
    """What the tutorial sets; the rest is as shipped (LoRA r 128, alpha 256, dropout 0.05).

    It warms up over 0.03 of a long run. Here that would be one iteration, and xtuner then never
    leaves the learning rate it starts with, so the share is larger.
    """

    batch_size: int = 4
    accumulative_counts: int = 2
    lr: float = 3e-5
    warmup_ratio: float = 0.1


def configuration(model: Path, rows: Rows, tutorial: Tutorial, iterations: int) -> str:
    """The shipped file with the tutorial's values; every iteration is logged as it is.

    ``iterations`` is also where the one checkpoint is saved.
    """
    text = (xtuner_folder() / _SHIPPED).read_text(encoding="utf-8")
    settings: dict[str, Setting] = {
        "path": str(model),
        "data_path": str(rows.file),
        "image_folder": str(rows.images),
        **msgspec.structs.asdict(tutorial),
        "save_steps": iterations,
    }
    for name, value in settings.items():
        text = _once(rf"^{name} = .*$", f"{name} = {value!r}", text)
    text = _once(r"interval=10\)", "interval=1)", text)
    text = _once(r"seed=None", f"seed={SEED}", text)
    return _once(
        r"^log_processor = .*$", "log_processor = dict(by_epoch=False, window_size=1)", text
    )


def train_command(config: Path, work: Path, *, cpu: bool) -> list[str]:
    """``train.py`` itself: the ``xtuner`` command hides failures and starts the same."""
    deepspeed = str(xtuner_folder() / _ZERO2)
    if cpu:
        deepspeed = str(_bf16(Path(deepspeed), work.with_suffix(".deepspeed.json")))
    return [
        *_python(cpu=cpu),
        str(xtuner_folder() / "tools" / "train.py"),
        str(config),
        *("--work-dir", str(work), "--deepspeed", deepspeed),
    ]


def convert_command(config: Path, checkpoint: Path, out: Path, *, cpu: bool) -> list[str]:
    """xtuner's own conversion to a folder in the official format."""
    converter = str(xtuner_folder() / _CONVERTER)
    return [*_python(cpu=cpu), converter, str(config), str(checkpoint), str(out)]


def environment() -> dict[str, str]:
    """Makes DeepSpeed open its process group alone, on a port of its own."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }


def _python(*, cpu: bool) -> list[str]:
    return [sys.executable, *(("-m", "benchmarks.gpu.on_cpu") if cpu else ())]


def _bf16(shipped: Path, out: Path) -> Path:
    """The shipped ZeRO-2 for a processor, where its "auto" finds no type of numbers."""
    stage = msgspec.json.decode(shipped.read_bytes())
    out.write_bytes(
        msgspec.json.encode({**stage, "fp16": {"enabled": False}, "bf16": {"enabled": True}})
    )
    return out


def _once(pattern: str, replacement: str, text: str) -> str:
    changed, count = re.subn(pattern, lambda _: replacement, text, flags=re.MULTILINE)
    assert count == 1, f"xtuner ships another configuration: {pattern} is {count} times in it"
    return changed
