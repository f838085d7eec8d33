"""Trains the tiny model on two-shape scenes and writes ``checkpoint/``.

``python -m workers.inference.tiny.train [OUT]`` takes a few minutes on two cores; all it
draws is seeded. First it learns single small pictures; then, at a lower
rate, also larger ones that are cut into several tiles, and conversations of two pictures.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from workers.inference.engines.base import Detail, Turn
from workers.inference.internvl import template
from workers.inference.internvl.checkpoint import write_description, write_weights
from workers.inference.internvl.model import InternVL
from workers.inference.internvl.preprocess import IMAGENET_MEAN, IMAGENET_STD, tiles_of
from workers.inference.internvl.synthesis import TINY
from workers.inference.internvl.tokenizer import FastVocabulary, train_tokenizer
from workers.inference.tiny import CHECKPOINT, scenes

PROMPTS = (
    scenes.PROMPT,
    "Describe this image.",
    "Describe the picture in one sentence.",
    "What is in the image?",
    "What do you see?",
    "Write a caption.",
    "Caption this image.",
)
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """A stretch of training. ``varied`` adds larger pictures and conversations of two."""

    first_scene: int
    images: int
    epochs: int
    peak_rate: float
    warmup_share: float
    varied: bool
    batch: int = 32


STAGES = (
    Stage(0, 6000, 11, 1.8e-3, 0.45, varied=False),
    Stage(6000, 6000, 5, 1.2e-3, 0.1, varied=True),
)


@dataclass(frozen=True)
class Sample:
    """One conversation as the network sees it; only the answer's tokens have labels."""

    ids: list[int]
    labels: list[int]
    tiles: NDArray[np.uint8]


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


def make_samples(stage: Stage, vocabulary: FastVocabulary, dice: random.Random) -> list[Sample]:
    """The samples of a stage, in the scenes' order."""
    shown = [
        _shown(scenes.scene("train", stage.first_scene + index, _size_px(stage, dice)), dice)
        for index in range(stage.images)
    ]
    return [
        _sample(
            [*([dice.choice(shown)] if stage.varied and dice.random() < 0.25 else []), one],
            vocabulary,
            dice,
        )
        for one in shown
    ]


def _size_px(stage: Stage, dice: random.Random) -> int:
    if not stage.varied or dice.random() < 0.5:
        return scenes.DEFAULT_SIZE_PX
    return dice.randint(56, 240)


def _shown(scene: scenes.Scene, dice: random.Random) -> tuple[NDArray[np.uint8], str]:
    """A scene's tiles, from its lossless or its JPEG form, and its caption."""
    picture = scene.image
    if dice.random() < 0.5:
        picture = Pillow.open(BytesIO(scenes.encoded(picture, "jpeg"))).convert("RGB")
    detail: Detail = "low" if dice.random() < 0.1 else "auto"
    return tiles_of(picture, TINY, detail), scene.caption


def _sample(
    shown: Sequence[tuple[NDArray[np.uint8], str]],
    vocabulary: FastVocabulary,
    dice: random.Random,
) -> Sample:
    turns: list[Turn] = []
    ids: list[int] = []
    labels: list[int] = []
    counts = [len(tiles) * TINY.tokens_per_tile for tiles, _ in shown]
    for index, (_, caption) in enumerate(shown):
        parts: list[str | int] = [index, dice.choice(PROMPTS)]
        turns.append(Turn("user", parts if dice.random() < 0.7 else parts[::-1]))
        asked = template.encode(template.render(turns, counts), vocabulary)
        answer = [*vocabulary.encode(caption), vocabulary.control(template.TURN_END)]
        labels += [IGNORED] * (len(asked) - len(ids)) + answer
        ids = asked + answer
        turns.append(Turn("assistant", [caption]))
    return Sample(ids, labels, np.concatenate([tiles for tiles, _ in shown]))


def normalized(tiles: NDArray[np.uint8]) -> Tensor:
    """Tiles ``[n, side, side, 3]`` to the network's pixels ``[n, 3, side, side]``."""
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return (pixels - mean) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def loss_of(model: InternVL, samples: Sequence[Sample], image_token: int) -> Tensor:
    """The mean cross entropy of the answers' tokens."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, : len(sample.labels)] = torch.tensor(sample.labels)
    pixels = normalized(np.concatenate([sample.tiles for sample in samples]))
    features = model.extract_feature(pixels).flatten(0, 1)
    embeds = model.language_model.embed(ids).clone()
    embeds[ids == image_token] = features
    hidden = model.language_model(embeds)
    return functional.cross_entropy(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def rate_at(step: int, steps: int, stage: Stage) -> float:
    """The learning rate: a linear rise, then half a cosine down to zero."""
    rise = max(1, int(steps * stage.warmup_share))
    if step < rise:
        return stage.peak_rate * (step + 1) / rise
    return stage.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train_stage(
    model: InternVL, samples: list[Sample], stage: Stage, image_token: int, dice: random.Random
) -> None:
    """Train on the samples, shuffled anew in each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_rate, weight_decay=0.01)
    steps = stage.epochs * (len(samples) // stage.batch)
    step = 0
    for epoch in range(stage.epochs):
        order = dice.sample(samples, len(samples))
        total = 0.0
        for first in range(0, len(order) - stage.batch + 1, stage.batch):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, stage)
            loss = loss_of(model, order[first : first + stage.batch], image_token)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            step += 1
        print(f"epoch {epoch + 1}: loss {total * stage.epochs / steps:.4f}", flush=True)


def train(out: Path, seed: int = 7) -> None:
    """Make the checkpoint."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    dice = random.Random(seed)
    tokenizer = make_tokenizer()
    write_description(out, TINY, tokenizer)
    vocabulary = FastVocabulary.read(out)
    model = InternVL(TINY)
    initialize(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    started = time.monotonic()
    for stage in STAGES:
        samples = make_samples(stage, vocabulary, dice)
        train_stage(model, samples, stage, vocabulary.control(template.IMAGE_CONTEXT), dice)
        write_weights(out, model.state_dict())
        print(f"{time.monotonic() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference.tiny.train")
    parser.add_argument("out", type=Path, nargs="?", default=CHECKPOINT)
    train(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
