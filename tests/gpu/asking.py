"""Pictures and questions for engines on a GPU."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image as Pillow
from PIL import ImageDraw

from workers.inference.engines.base import Image, Prompt, Sampling, Turn
from workers.inference.engines.lmdeploy_engine import LmdeployEngine


def picture(seed: int, width: int = 448, height: int = 448) -> Pillow.Image:
    """A picture of a few large shapes, different for every seed."""
    drawn = Pillow.new("RGB", (width, height), (seed * 61 % 256, seed * 97 % 256, 90))
    pen = ImageDraw.Draw(drawn)
    for number in range(6):
        corner = (seed * 37 + number * 83) % (width - 80), (seed * 59 + number * 71) % height
        colour = (number * 40, seed * 29 % 256, 255 - number * 40)
        pen.rectangle((*corner, corner[0] + 70, corner[1] + 60), fill=colour)
    return drawn


def file_of(drawn: Pillow.Image, kind: str = "PNG") -> Image:
    """A picture as a file."""
    out = io.BytesIO()
    drawn.save(out, kind)
    return Image(out.getvalue())


def about(*images: Image, prompt_id: int = 1, **sampling: Any) -> Prompt:
    """A prompt that shows images, with a deterministic answer of 12 tokens."""
    settings = {"temperature": 0.0, "max_tokens": 12, "min_new_tokens": 12, **sampling}
    parts: list[str | int] = [*range(len(images)), "what is in this image"]
    return Prompt(prompt_id, [Turn("user", parts)], Sampling(**settings), list(images))


async def completed(engine: LmdeployEngine, prompts: list[Prompt]) -> dict[int, Any]:
    return {prompt_id: answer async for prompt_id, answer in engine.complete(prompts)}
