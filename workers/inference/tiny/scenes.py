"""Seeded pictures of two shapes, each with the one sentence that describes it.

The tiny model learns from them; tests, the demo and the benchmarks ask about them. A scene is
decided by its split and index alone. The splits share no image: a picture belongs to the split
that the digest of its own pixels names, so a held-out scene cannot have been trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "held_out"]
Encoding = Literal["jpeg", "png"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (38, 84, 214),
    "yellow": (240, 208, 32),
    "purple": (140, 50, 170),
    "orange": (246, 130, 24),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "above")
PROMPT = "Describe the image."
DEFAULT_SIZE_PX = 64

_SUPERSAMPLING = 4
_HELD_OUT_SHARE = 5  # one picture in so many belongs to the held-out split


@dataclass(frozen=True)
class Scene:
    """An RGB picture and its exact caption, for example "a red circle left of a blue square"."""

    image: Image.Image
    caption: str


@dataclass(frozen=True)
class _Shape:
    colour: str
    kind: str
    x: float  # centre, as a share of the picture's width
    y: float
    radius: float


def scene(split: Split, index: int, size_px: int = DEFAULT_SIZE_PX) -> Scene:
    """The scene with this index: the same on every call."""
    attempt = 0
    while True:
        dice = random.Random(f"{split}:{index}:{attempt}")
        candidate = _draw(dice, size_px)
        if _split_of(candidate.image) == split:
            return candidate
        attempt += 1


def scenes(
    split: Split, count: int, *, start: int = 0, size_px: int = DEFAULT_SIZE_PX
) -> Iterator[Scene]:
    """The ``count`` scenes from index ``start`` on."""
    for index in range(start, start + count):
        yield scene(split, index, size_px)


def encoded(picture: Image.Image, encoding: Encoding = "jpeg") -> bytes:
    """The picture as a JPEG (quality 90) or PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, encoding.upper(), **({"quality": 90} if encoding == "jpeg" else {}))
    return buffer.getvalue()


def write_folder(out: Path, count: int, split: Split, size_px: int = DEFAULT_SIZE_PX) -> Path:
    """Write scenes as image files, JPEG and PNG in turn, beside ``captions.jsonl``.

    Returns the path of the captions file; each of its lines is ``{"image", "caption"}``.
    """
    out.mkdir(parents=True, exist_ok=True)
    captions = out / "captions.jsonl"
    with captions.open("w", encoding="utf-8") as lines:
        for index, one in enumerate(scenes(split, count, size_px=size_px)):
            encoding: Encoding = "png" if index % 2 else "jpeg"
            name = f"scene_{index:05d}.{'png' if index % 2 else 'jpg'}"
            (out / name).write_bytes(encoded(one.image, encoding))
            lines.write(json.dumps({"image": name, "caption": one.caption}) + "\n")
    return captions


def _split_of(image: Image.Image) -> Split:
    digest = hashlib.sha256(image.tobytes()).digest()
    share = int.from_bytes(digest[:4], "big") % _HELD_OUT_SHARE
    return "held_out" if share == 0 else "train"


def _draw(dice: random.Random, size_px: int) -> Scene:
    relation = dice.choice(RELATIONS)
    first, second = _place(dice, relation)
    side = size_px * _SUPERSAMPLING
    shade = dice.randint(215, 255)
    canvas = Image.new("RGB", (side, side), (shade, shade, shade))
    pen = ImageDraw.Draw(canvas)
    for shape in (first, second):
        _draw_shape(pen, shape, side, _jittered(dice, COLOURS[shape.colour]))
    image = canvas.resize((size_px, size_px), Image.Resampling.BOX)
    caption = f"a {first.colour} {first.kind} {relation} a {second.colour} {second.kind}"
    return Scene(image, caption)


def _place(dice: random.Random, relation: str) -> tuple[_Shape, _Shape]:
    shapes = []
    for centre in (0.27, 0.73):
        along = centre + dice.uniform(-0.03, 0.03)
        across = 0.5 + dice.uniform(-0.2, 0.2)
        x, y = (along, across) if relation == "left of" else (across, along)
        shapes.append(
            _Shape(dice.choice(list(COLOURS)), dice.choice(SHAPES), x, y, dice.uniform(0.16, 0.2))
        )
    return shapes[0], shapes[1]


def _jittered(dice: random.Random, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, part + dice.randint(-12, 12))) for part in colour)
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: _Shape, side: int, fill: tuple[int, int, int]
) -> None:
    x, y, radius = shape.x * side, shape.y * side, shape.radius * side
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.kind == "circle":
        pen.ellipse(box, fill=fill)
    elif shape.kind == "square":
        pen.rectangle(box, fill=fill)
    elif shape.kind == "triangle":
        pen.polygon(
            [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill
        )
    else:
        arm = radius * 0.36
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def main(arguments: list[str] | None = None) -> None:
    """Command line: write a folder of scenes."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference.tiny.scenes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--split", choices=("train", "held_out"), default="held_out")
    parser.add_argument("--size-px", type=int, default=DEFAULT_SIZE_PX)
    chosen = parser.parse_args(arguments)
    captions = write_folder(chosen.out, chosen.count, chosen.split, chosen.size_px)
    sys.stdout.write(f"{chosen.count} scenes and {captions.name} are in {chosen.out}\n")


if __name__ == "__main__":
    main()
