"""The tiny model before it has learned anything: where the demonstration of fine-tuning begins.

    python -m workers.inference.tiny.untrained OUT

Its weights are random and its tokenizer knows the words of scenes' captions.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from workers.inference.internvl import template
from workers.inference.internvl.checkpoint import write_description, write_weights
from workers.inference.internvl.model import InternVL
from workers.inference.internvl.synthesis import TINY
from workers.inference.internvl.tokenizer import train_tokenizer
from workers.inference.tiny import scenes

PROMPTS = (
    scenes.PROMPT,
    "Describe this image.",
    "Describe the picture in one sentence.",
    "What is in the image?",
    "What do you see?",
    "Write a caption.",
    "Caption this image.",
)
"""What the trained model was asked with."""
SEED = 7


def captions() -> Iterator[str]:
    """Every sentence there is."""
    things = [f"a {colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
    for relation in scenes.RELATIONS:
        for first in things:
            for second in things:
                yield f"{first} {relation} {second}"


def make_tokenizer() -> Tokenizer:
    """A tokenizer in which captions, prompts and the system prompt are short."""
    roles = ["system\n", "user\n", "assistant\n"]
    return train_tokenizer(
        [*captions(), *[*PROMPTS, template.SYSTEM_PROMPT, *roles] * 200], TINY.language.vocab_size
    )


def initialize(model: InternVL) -> None:
    """Draw every matrix with a deviation of 1/sqrt(hidden); smaller ones never left a plateau."""
    deviation = 1 / math.sqrt(model.config.language.hidden_size)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=deviation)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def write_untrained(out: Path, seed: int = SEED) -> None:
    """Write the checkpoint; the same seed gives the same weights."""
    torch.manual_seed(seed)
    write_description(out, TINY, make_tokenizer())
    model = InternVL(TINY)
    initialize(model)
    write_weights(out, model.state_dict())


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference.tiny.untrained")
    parser.add_argument("out", type=Path)
    out = parser.parse_args(arguments).out
    write_untrained(out)
    sys.stdout.write(f"an untrained InternVL2 of 0.4 million parameters is in {out}\n")


if __name__ == "__main__":
    main()
