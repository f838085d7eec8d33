"""Checkpoint folders: reading published and own ones into the network, and writing own ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shared.checkpoints import SINGLE, weight_files
from shared.errors import CheckpointInvalid

from . import template
from .config import ModelConfig, to_json
from .model import InternVL
from .preprocess import IMAGENET_MEAN, IMAGENET_STD
from .tokenizer import write_json, write_tokenizer


def read_model(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> InternVL:
    """Build the network and fill it, tensor by tensor, from the folder's safetensors files.

    Raises: CheckpointInvalid.
    """
    with torch.device("meta"):
        model = InternVL(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder):
        if name not in wanted:
            raise CheckpointInvalid(
                f"the tensor {name} is not part of the model that config.json describes"
            )
        if tensor.shape != wanted[name]:
            raise CheckpointInvalid(
                f"the tensor {name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(wanted[name])}"
            )
        found[name] = tensor.to(device=device, dtype=dtype)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CheckpointInvalid(
            f"{len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}"
        )
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_(False)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointInvalid(f"{file.name} is damaged or cut short: {error}") from None


def write_weights(out: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights as one bfloat16 file."""
    stored = {
        name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    (out / SINGLE).chmod(0o644)  # the library writes it for its owner alone


def write_description(out: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write every file of a checkpoint but its weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokens = {
        "bos": tokenizer.token_to_id(template.BEGIN),
        "eos": tokenizer.token_to_id(template.END),
        "pad": tokenizer.token_to_id(template.END),
    }
    write_tokenizer(tokenizer, out)
    write_json(out / "config.json", to_json(config, tokens))
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": tokens["bos"],
            "eos_token_id": [tokenizer.token_to_id(template.TURN_END), tokens["eos"]],
            "pad_token_id": tokens["pad"],
        },
    )
    write_json(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "feature_extractor_type": "CLIPFeatureExtractor",
            "crop_size": config.tile_px,
            "size": config.tile_px,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
            "resample": 3,
        },
    )
