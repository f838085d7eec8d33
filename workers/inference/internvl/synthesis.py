"""Writes InternVL2 checkpoints with random weights, for load tests and for tests of loaders.

``python -m workers.inference.internvl.synthesis OUT --size 2b`` writes the shapes of InternVL2-2B
(517 tensors, 2,205,754,368 parameters, 4.4 GB in bfloat16). Weights are drawn and written in
blocks, so memory stays small; the same seed gives the same files. No network is used.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from . import template
from .checkpoint import INDEX, SINGLE, write_description
from .config import LanguageConfig, ModelConfig, VisionConfig
from .export import add_code
from .model import InternVL
from .tokenizer import train_tokenizer, write_json

INTERNVL2_2B = ModelConfig(
    vision=VisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        image_size=448,
        patch_size=14,
    ),
    language=LanguageConfig(
        vocab_size=92553,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        intermediate_size=8192,
        rope_theta=1e6,
    ),
)
TINY = ModelConfig(
    vision=VisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=56,
        patch_size=14,
    ),
    language=LanguageConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        rope_theta=1e6,
    ),
)
SIZES = {"2b": INTERNVL2_2B, "tiny": TINY}

_SHARD_BYTES = 2 * 1024**3
_BLOCK = 8 * 1024**2  # numbers drawn at a time
_DEVIATION = 0.02
_WORDS = ("the", "a", "of", "and", "in", "is", "on", "image", "describe", "what", "this", "shows")

Shapes = dict[str, torch.Size]


def shapes_of(config: ModelConfig) -> Shapes:
    """The name and shape of every tensor of a model."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in InternVL(config).state_dict().items()}


def write_random(out: Path, config: ModelConfig, seed: int = 0, device: str = "cpu") -> int:
    """Write a checkpoint with random weights; returns its number of parameters.

    They are drawn on ``device``: a GPU is faster, and has other files for the same seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(
        [" ".join(_WORDS), template.SYSTEM_PROMPT], config.language.vocab_size
    )
    write_description(out, config, tokenizer)
    shapes = shapes_of(config)
    shards = _shards(shapes)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        _write_shard(out / name, shard, generator)
        weight_map.update(dict.fromkeys(shard, name))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    if len(shards) > 1:
        write_json(
            out / INDEX, {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
        )
    return parameters


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        needed = 2 * math.prod(shape)
        if shards[-1] and size + needed > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += needed
    return shards


def _write_shard(path: Path, shapes: Shapes, generator: torch.Generator) -> None:
    """Write one safetensors file: a length, a JSON header of offsets, then the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name, shape in shapes.items():
            _write_tensor(file, name, math.prod(shape), generator)


def _write_tensor(file: BinaryIO, name: str, count: int, generator: torch.Generator) -> None:
    blocks = _blocks(name, count, generator)
    file.writelines(
        block.to(torch.bfloat16).view(torch.uint8).cpu().numpy().data for block in blocks
    )


def _blocks(name: str, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        if _is_scale(name):
            yield torch.ones(size)
        elif name.endswith(".bias"):
            yield torch.zeros(size)
        else:
            drawn = torch.empty(size, device=generator.device)
            yield drawn.normal_(std=_DEVIATION, generator=generator)


def _is_scale(name: str) -> bool:
    *_, owner, kind = name.split(".")
    if kind in ("ls1", "ls2") or name == "mlp1.0.weight":
        return True
    return kind == "weight" and "norm" in owner


def main(arguments: list[str] | None = None) -> None:
    """Command line: write a checkpoint with random weights."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference.internvl.synthesis")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="2b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--with-code", action="store_true", help="add modelling code, as lmdeploy and xtuner want"
    )
    chosen = parser.parse_args(arguments)
    parameters = write_random(chosen.out, SIZES[chosen.size], chosen.seed)
    if chosen.with_code:
        add_code(chosen.out)
    sys.stdout.write(f"{parameters:,} random parameters are in {chosen.out}\n")


if __name__ == "__main__":
    main()
