"""Rows and pictures to fine-tune on: photographs of 1024 x 768 with captions, as LLaVA JSON."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from benchmarks.gpu.photos import Kind, write_photos

PHOTO_1024 = Kind("1024x768", 1024, 768, 3.2)
"""Twelve tiles and a thumbnail."""
_DISHES = ("麻婆豆腐", "小笼包", "宫保鸡丁", "螺蛳粉", "锅包肉", "臭豆腐", "叉烧", "热干面", "凉皮")
_QUESTION = "图片中的食物通常属于哪个菜系?\n<image>"
_CUISINES = ("川菜", "粤菜", "鲁菜", "苏菜", "浙菜", "闽菜", "湘菜", "徽菜")


class Rows(msgspec.Struct, frozen=True):
    """Where the rows and their pictures are."""

    file: Path
    images: Path
    count: int


def write_rows(folder: Path, count: int, *, distinct: int) -> Rows:
    """Write ``count`` rows like the tutorial's, of which ``distinct`` have their own picture."""
    images = folder / "photos"
    photos = write_photos(images, PHOTO_1024, count, distinct=distinct)
    chance = random.Random(0)
    rows = [
        {
            "image": photo.name,
            "conversations": [
                {"from": "human", "value": _QUESTION},
                {
                    "from": "gpt",
                    "value": f"{chance.choice(_CUISINES)}，图中的菜是{chance.choice(_DISHES)}",
                },
            ],
        }
        for photo in photos
    ]
    file = folder / "train.json"
    file.write_bytes(msgspec.json.encode(rows))
    return Rows(file, images, count)
