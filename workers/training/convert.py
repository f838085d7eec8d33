"""A checkpoint of a fine-tune to a model folder: ``python -m workers.training.convert JOB.json``.

xtuner's own conversion merges LoRA and saves weights and tokenizer. What a serving engine needs
beyond that is the base's: its code, its processor's files, its generation settings. The folder appears whole
or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shared.checkpoints import CONFIG, check_checkpoint
from shared.errors import CheckpointInvalid
from shared.storage import sync_folder
from workers.training import surroundings
from workers.training.orders import ConvertJob, read_order
from workers.training.saved import checkpoint_at
from workers.training.trainer import provide_base

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def main(arguments: list[str]) -> None:
    """Command line; says what is wrong and ends with status 1 if it cannot be done."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m workers.training.convert JOB.json")
    try:
        convert(read_order(Path(arguments[0]), ConvertJob))
    except CheckpointInvalid as error:
        raise SystemExit(f"not converted: {error.message}") from None


def convert(job: ConvertJob) -> None:
    """Make ``job.out``; it is left alone if it is there already, as it is whole then.

    Raises: CheckpointInvalid for a checkpoint that is not whole, or a result that is not.
    """
    out, base = Path(job.out), Path(job.base)
    if out.is_dir():
        return
    if checkpoint_at(Path(job.checkpoint)) is None:
        raise CheckpointInvalid(f"{job.checkpoint} is not whole; convert an earlier checkpoint")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with TemporaryDirectory(dir=part.parent, prefix=f".{out.name}.cache.") as cache:
        surroundings.prepare_environment(Path(cache))
        surroundings.single_process_group()
        surroundings.prepare_imports()
        surroundings.attend_without_flash()
        provide_base(base, Path(job.model_path))
        save_merged(job, part)
    complete(part, base)
    check_checkpoint(part)
    _make_durable(part)
    part.rename(out)


def save_merged(job: ConvertJob, out: Path) -> None:
    """Write the weights, LoRA merged into them.

    As xtuner's ``convert_to_official`` does, but for the numbers: that rounds what was learnt to
    float16 first, and to bfloat16 before it is merged. Here it is rounded once, at the end.

    Raises: CheckpointInvalid for a checkpoint of another configuration.
    """
    import torch
    from mmengine.config import Config
    from xtuner.model.utils import LoadWoInit
    from xtuner.registry import BUILDER

    config = Config.fromfile(job.config)
    config.model.quantization_vit = False
    config.model.quantization_llm = False
    with LoadWoInit():
        wrapper: Any = BUILDER.build(config.model)
    load_trained(wrapper, Path(job.checkpoint))
    model = wrapper.model
    if wrapper.use_visual_encoder_lora:
        model.vision_model = model.vision_model.merge_and_unload()
    if wrapper.use_llm_lora:
        model.language_model = model.language_model.merge_and_unload()
    wrapper.to(dtype_of(Path(job.base)) or torch.bfloat16)
    model.save_pretrained(out, safe_serialization=True)


def load_trained(wrapper: Any, checkpoint: Path) -> None:
    """Put what was learnt, in float32, where it belongs. Raises: CheckpointInvalid."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    learnt = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
    )
    unknown = wrapper.load_state_dict(learnt, strict=False).unexpected_keys
    lacking = {
        name for name, parameter in wrapper.named_parameters() if parameter.requires_grad
    } - learnt.keys()
    if unknown or lacking:
        raise CheckpointInvalid(
            f"{checkpoint} was not trained with this configuration: it has {len(unknown)} unknown "
            f"tensors and lacks {len(lacking)}, such as {min([*unknown, *lacking])}"
        )


def dtype_of(base: Path) -> Any:
    """The number type that a base's config names; None if it names none."""
    import torch

    name = json.loads((base / CONFIG).read_text(encoding="utf-8")).get("torch_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None


def complete(out: Path, base: Path) -> None:
    """Add what the base has and the weights are not: config, code, processor, tokenizer, settings.

    The config is the base's own, since a tuned model differs in its weights alone; what transformers
    made of it when it saved them may lack keys that engines read.
    """
    for path in out.iterdir():
        if not path.name.endswith(_WEIGHTS):
            path.unlink()
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, out / path.name)


def _make_durable(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
