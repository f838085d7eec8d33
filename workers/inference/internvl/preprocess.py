"""Pictures to arrays of tiles, as InternVL2 was trained; how they are cut is in ``tiling``."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from shared.errors import (
    ImageError,
    ImagesCutOtherwise,
    ImageTooLarge,
    ImageTruncated,
    ImageUnreadable,
)
from workers.inference.engines.base import Detail, Image, Tiling
from workers.inference.orientation import upright, upright_size
from workers.inference.tiling import cut, grid_of, tile_count

from .config import ModelConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Tiles = NDArray[np.uint8]
"""``[tiles, side, side, 3]``, values 0 to 255."""


def tiling_of(config: ModelConfig) -> Tiling:
    """How a model's pictures are cut."""
    if not config.dynamic_image_size:
        return Tiling(config.tile_px)
    return Tiling(
        config.tile_px,
        config.min_dynamic_patch,
        config.max_dynamic_patch,
        thumbnail=config.use_thumbnail,
    )


def tiles_of(picture: Pillow.Image, config: ModelConfig, detail: Detail = "auto") -> Tiles:
    """Cut an upright RGB picture: row by row, the thumbnail last."""
    tiling = tiling_of(config)
    grid = grid_of(picture.width, picture.height, tiling, detail)
    side = config.tile_px
    return np.frombuffer(cut(picture, grid, tiling), np.uint8).reshape(-1, side, side, 3)


def tiles_in(image: Image, tile_px: int) -> Tiles:
    """The tiles of an image that was cut before. Raises: ImagesCutOtherwise, ImageError."""
    if image.tile_px != tile_px:
        raise ImagesCutOtherwise()
    if not image.data or len(image.data) % (tile_px * tile_px * 3):
        raise ImageError(f"an image of {len(image.data)} bytes is no whole number of tiles")
    return np.frombuffer(image.data, np.uint8).reshape(-1, tile_px, tile_px, 3)


class Picture:
    """An image of a prompt: how many tiles it is can be asked before it is decoded.

    Raises: ImageError.
    """

    def __init__(self, image: Image, config: ModelConfig) -> None:
        self._config = config
        self._detail = image.detail
        self._cut = tiles_in(image, config.tile_px) if image.encoding == "tiles" else None
        self._opened = open_image(image) if self._cut is None else None

    @property
    def tile_count(self) -> int:
        """The thumbnail included."""
        if self._cut is not None:
            return len(self._cut)
        assert self._opened is not None
        return tile_count(*upright_size(self._opened), tiling_of(self._config), self._detail)

    def tiles(self) -> Tiles:
        """Every tile. Raises: ImageTruncated, ImageError."""
        if self._cut is not None:
            return self._cut
        assert self._opened is not None
        return tiles_of(decode(self._opened), self._config, self._detail)


def open_image(image: Image) -> Pillow.Image:
    """Open an image of a prompt; the pixels of a file are not decoded yet.

    Raises: ImageUnreadable, ImageTooLarge.
    """
    if image.encoding == "tiles":
        raise ImagesCutOtherwise()
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
    """Decode every pixel, to upright RGB. Raises: ImageTruncated, ImageError."""
    try:
        picture.load()
        return upright(picture).convert("RGB")
    except OSError as error:
        if "truncated" in str(error):
            raise ImageTruncated from None
        raise ImageError(f"the image cannot be decoded: {error}") from None
    except (ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ImageError(f"the image cannot be decoded: {error}") from None
