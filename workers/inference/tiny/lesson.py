"""Scenes as a lesson: rows and pictures that a fine-tune learns captions from.

    python -m workers.inference.tiny.lesson OUT --count 12000 --varied

Writes ``rows.jsonl`` (OpenAI's chat format, pictures by file name) and ``pictures/``. The same
arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from workers.inference.tiny import scenes
from workers.inference.tiny.untrained import PROMPTS

ROWS = "rows.jsonl"
PICTURES = "pictures"
SEED = 7
SMALLEST_PX, LARGEST_PX = 56, 240


def write_lesson(out: Path, count: int, *, varied: bool = False) -> None:
    """Write ``count`` rows about scenes of the training split.

    ``varied`` asks in several ways, and makes half of the later half's pictures of other sizes,
    which are cut into several tiles.
    """
    dice = random.Random(SEED)
    pictures = out / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    with (out / ROWS).open("w", encoding="utf-8") as lines:
        for index in range(count):
            other = varied and index >= count // 2 and dice.random() >= 0.5
            size_px = dice.randint(SMALLEST_PX, LARGEST_PX) if other else scenes.DEFAULT_SIZE_PX
            scene = scenes.scene("train", index, size_px)
            encoding: scenes.Encoding = "jpeg" if dice.random() < 0.5 else "png"
            name = f"{index:05d}.{'jpg' if encoding == 'jpeg' else 'png'}"
            (pictures / name).write_bytes(scenes.encoded(scene.image, encoding))
            asked = dice.choice(PROMPTS) if varied else scenes.PROMPT
            lines.write(_row(name, asked, scene.caption))


def _row(image: str, asked: str, caption: str) -> str:
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": asked},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]
    return json.dumps({"messages": messages}) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference.tiny.lesson")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4800)
    parser.add_argument("--varied", action="store_true", help="several sizes and questions")
    chosen = parser.parse_args(arguments)
    write_lesson(chosen.out, chosen.count, varied=chosen.varied)
    sys.stdout.write(f"{chosen.count} rows and their pictures are in {chosen.out}\n")


if __name__ == "__main__":
    main()
