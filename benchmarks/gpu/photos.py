"""JPEG pictures with the entropy of photographs, made from a seed.

A picture is soft shapes of several sizes plus a little grain, so that a file has about the bytes of
a camera's or a scraped image of its size, and decoding it costs what decoding those costs. Plain
noise would be several times as large, drawn shapes several times smaller.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_QUALITY = 85
_SHAPES = ((4, 60.0), (16, 28.0), (64, 12.0))
"""Cells along the shorter side, and how strongly they differ, of 255."""


class Kind(msgspec.Struct, frozen=True):
    """Pictures of one size. ``grain`` is the deviation of the finest detail, of 255."""

    name: str
    width: int
    height: int
    grain: float


SMALL = Kind("448", 448, 448, 3.4)
"""About 40 kB, one tile."""
HD = Kind("1080p", 1920, 1080, 3.2)
"""About 300 kB: eight tiles and a thumbnail."""
PHOTO = Kind("12mp", 4000, 3000, 9.5)
"""3 to 4 MB."""


def picture(kind: Kind, seed: int) -> Image.Image:
    """One picture; the same seed gives the same one."""
    random = np.random.default_rng([seed, kind.width, kind.height])
    field = np.full((kind.height, kind.width, 3), 118.0, np.float32)
    for cells, strength in _SHAPES:
        field += strength * _soft(random, kind, cells)
    field += _grain(random, kind)[..., None]
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, kind: Kind, count: int, *, distinct: int) -> list[Path]:
    """Write ``count`` files, of which ``distinct`` differ; the others are links to those.

    All processors draw. Files of one name are the same in every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{kind.name}-{number:05d}.jpg" for number in range(count)]
    distinct = min(distinct, count)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(_write, kind), paths[:distinct], range(distinct), chunksize=4))
    for number in range(distinct, count):
        os.link(paths[number % distinct], paths[number])
    return paths


def _write(kind: Kind, path: Path, seed: int) -> None:
    picture(kind, seed).save(path, "JPEG", quality=_QUALITY)


def _soft(random: np.random.Generator, kind: Kind, cells: int) -> NDArray[np.float32]:
    """Soft blobs in three colours, of deviation about 1: ``[height, width, 3]``."""
    across = max(1, cells * kind.width // kind.height)
    coarse = random.normal(size=(cells, across, 3)).astype(np.float32)
    size = (kind.width, kind.height)
    layers = [
        Image.fromarray(coarse[..., colour]).resize(size, Image.Resampling.BICUBIC)
        for colour in range(3)
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def _grain(random: np.random.Generator, kind: Kind) -> NDArray[np.float32]:
    """Grey noise, stronger in some regions than in others: ``[height, width]``."""
    noise = random.standard_normal((kind.height, kind.width), dtype=np.float32)
    where = 0.5 + np.abs(_soft(random, kind, 8)[..., 0])
    return (kind.grain * noise * where).astype(np.float32)
