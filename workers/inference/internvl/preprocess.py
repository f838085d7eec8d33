"""Pictures to tiles, as InternVL2 was trained.

The grid of square tiles that fits best, then a thumbnail of the whole. Needs Pillow and numpy, no
torch, so consumers may use it too.

Source: the preprocessing published with InternVL 1.5 and 2 (arXiv 2404.16821, section 3.3).
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from shared.errors import ImageError, ImageTooLarge, ImageTruncated, ImageUnreadable
from workers.inference.engines.base import Image

from .config import ModelConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Grid = tuple[int, int]
"""Columns and rows of tiles."""


@lru_cache(maxsize=16)
def grids(smallest: int, largest: int) -> tuple[Grid, ...]:
    """Every grid of ``smallest`` to ``largest`` tiles, those of few tiles first.

    Grids of equally many tiles stand in the order of the published code, which sorts a set: the
    choice between two that fit alike depends on it.
    """
    found = {
        (columns, rows)
        for count in range(smallest, largest + 1)
        for columns in range(1, count + 1)
        for rows in range(1, count + 1)
        if smallest <= columns * rows <= largest
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def closest_grid(width: int, height: int, choices: tuple[Grid, ...], tile_px: int) -> Grid:
    """The grid whose aspect ratio is closest to the picture's.

    Of two that fit alike the later one wins if the picture has more than half its pixels.
    """
    aspect, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in choices:
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * tile_px**2 * columns * rows:
            best = (columns, rows)
    return best


def grid_of(width: int, height: int, config: ModelConfig, detail: str = "auto") -> Grid:
    """The grid a picture of ``width`` by ``height`` pixels is cut into."""
    if detail == "low" or not config.dynamic_image_size:
        return (1, 1)
    choices = grids(config.min_dynamic_patch, config.max_dynamic_patch)
    return closest_grid(width, height, choices, config.tile_px)


def tile_count(width: int, height: int, config: ModelConfig, detail: str = "auto") -> int:
    """How many tiles, the thumbnail included, a picture becomes."""
    columns, rows = grid_of(width, height, config, detail)
    return columns * rows + (1 if config.use_thumbnail and columns * rows > 1 else 0)


def tiles_of(picture: Pillow.Image, config: ModelConfig, detail: str = "auto") -> NDArray[np.uint8]:
    """Cut an RGB picture: ``[tiles, side, side, 3]`` bytes, row by row, the thumbnail last."""
    side = config.tile_px
    columns, rows = grid_of(picture.width, picture.height, config, detail)
    bicubic = Pillow.Resampling.BICUBIC
    scaled = np.array(picture.resize((columns * side, rows * side), bicubic))
    cut = scaled.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    if not config.use_thumbnail or len(cut) == 1:
        return cut
    thumbnail = np.asarray(picture.resize((side, side), bicubic))
    return np.concatenate([cut, thumbnail[None]])


def open_image(image: Image) -> Pillow.Image:
    """Open an image of a prompt; the pixels of a file are not decoded yet.

    Raises: ImageUnreadable, ImageTooLarge.
    """
    if image.encoding == "rgb":
        if image.width < 1 or image.height < 1:
            raise ImageUnreadable("a raw image needs a width and a height")
        if len(image.data) != image.width * image.height * 3:
            raise ImageUnreadable(
                f"a raw image of {image.width} x {image.height} has {len(image.data)} bytes"
            )
        return Pillow.frombytes("RGB", (image.width, image.height), image.data)
    try:
        return Pillow.open(io.BytesIO(image.data))
    except UnidentifiedImageError:
        raise ImageUnreadable from None
    except Pillow.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageUnreadable(f"the image cannot be opened: {error}") from None


def decode(picture: Pillow.Image) -> Pillow.Image:
    """Decode every pixel, to RGB. Raises: ImageTruncated, ImageError."""
    try:
        return picture.convert("RGB")
    except OSError as error:
        if "truncated" in str(error):
            raise ImageTruncated from None
        raise ImageError(f"the image cannot be decoded: {error}") from None
    except (ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ImageError(f"the image cannot be decoded: {error}") from None
