"""Tiling as InternVL2 was trained: which grid, which pixels, and what a broken image becomes."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from shared.errors import ImageTruncated, ImageUnreadable
from workers.inference.engines.base import Image
from workers.inference.internvl.preprocess import (
    decode,
    open_image,
    tiles_of,
    tiling_of,
)
from workers.inference.internvl.synthesis import INTERNVL2_2B, TINY
from workers.inference.tiling import grid_of, grids, tile_count


def _noise(width: int, height: int, seed: int = 0) -> Pillow.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


def _file(picture: Pillow.Image, encoding: str) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, encoding)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "grid", "tiles"),
    [
        ((448, 448), (1, 1), 1),
        ((1920, 1080), (4, 2), 9),
        ((1024, 768), (4, 3), 13),
        ((100, 100), (1, 1), 1),
        ((2000, 2000), (3, 3), 10),
        ((500, 4000), (1, 8), 9),
        ((800, 400), (2, 1), 3),
        ((10, 4000), (1, 12), 13),
    ],
)
def test_the_grid_is_the_published_one(
    size: tuple[int, int], grid: tuple[int, int], tiles: int
) -> None:
    """Closest aspect ratio; of equally close ones the larger if the picture fills half of it."""
    assert grid_of(*size, tiling_of(INTERNVL2_2B)) == grid
    assert tile_count(*size, tiling_of(INTERNVL2_2B)) == tiles


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_no_allowed_grid_fits_better_than_the_chosen(width: int, height: int, most: int) -> None:
    """Whatever the picture, the grid is allowed and its aspect ratio the closest there is."""
    config = replace(INTERNVL2_2B, max_dynamic_patch=most)
    columns, rows = grid_of(width, height, tiling_of(config))
    assert 1 <= columns * rows <= most
    aspect = width / height
    closest = min(abs(aspect - c / r) for c, r in grids(1, most))
    assert abs(aspect - columns / rows) == closest


def test_low_detail_and_static_models_use_one_tile() -> None:
    """One tile, no thumbnail, whatever the size."""
    assert tile_count(1920, 1080, tiling_of(INTERNVL2_2B), "low") == 1
    assert tile_count(1920, 1080, tiling_of(replace(INTERNVL2_2B, dynamic_image_size=False))) == 1
    assert len(tiles_of(_noise(300, 120), TINY, "low")) == 1


def test_tiles_are_crops_of_the_scaled_picture_and_the_thumbnail_is_last() -> None:
    """Row by row, then the whole picture at a tile's size, all by bicubic scaling."""
    picture = _noise(230, 110)
    side = TINY.tile_px
    columns, rows = grid_of(230, 110, tiling_of(TINY))
    scaled = picture.resize((columns * side, rows * side), Pillow.Resampling.BICUBIC)
    tiles = tiles_of(picture, TINY)
    assert len(tiles) == columns * rows + 1 > 2
    for index in range(columns * rows):
        left, top = index % columns * side, index // columns * side
        crop = scaled.crop((left, top, left + side, top + side))
        assert np.array_equal(tiles[index], np.asarray(crop))
    thumbnail = picture.resize((side, side), Pillow.Resampling.BICUBIC)
    assert np.array_equal(tiles[-1], np.asarray(thumbnail))


def test_raw_pixels_and_a_png_of_them_give_the_same_tiles() -> None:
    """What a consumer prepared counts like the file it came from."""
    picture = _noise(130, 70)
    raw = Image(picture.tobytes(), "rgb", 130, 70)
    file = Image(_file(picture, "PNG"))
    assert np.array_equal(
        tiles_of(decode(open_image(raw)), TINY), tiles_of(decode(open_image(file)), TINY)
    )


def test_palette_and_grey_files_become_rgb() -> None:
    """Any mode is converted before it is cut."""
    grey = Image(_file(_noise(60, 60).convert("L"), "PNG"))
    palette = Image(_file(_noise(60, 60).convert("P"), "GIF"))
    for image in (grey, palette):
        assert tiles_of(decode(open_image(image)), TINY).shape == (1, 56, 56, 3)


def test_a_truncated_file_is_an_error_not_a_half_grey_picture() -> None:
    """Its header opens; decoding it fails with the reason."""
    whole = _file(_noise(200, 200), "JPEG")
    with pytest.raises(ImageTruncated):
        decode(open_image(Image(whole[: len(whole) // 2])))


@pytest.mark.parametrize(
    "image",
    [
        Image(b"no image at all"),
        Image(b""),
        Image(b"\x00" * 11, "rgb", 2, 2),
        Image(b"", "rgb", 0, 0),
    ],
)
def test_bytes_that_are_no_image_are_unreadable(image: Image) -> None:
    """Rubbish, nothing, and raw pixels of the wrong length."""
    with pytest.raises(ImageUnreadable):
        open_image(image)
