"""Which grid of tiles an image becomes, and the cutting.

What InternVL and its kin were trained on: the image is scaled to the grid whose shape is closest
to its own, and the whole follows once more as a thumbnail. Needs Pillow only, so that consumers
can do it. Knows no models: what to cut is said by an engine's
:class:`~workers.inference.engines.base.Tiling`.

Source: the preprocessing published with InternVL 1.5 and 2 (arXiv 2404.16821, section 3.3).
"""

from __future__ import annotations

from functools import lru_cache

from PIL import Image as Pillow

from workers.inference.engines.base import Detail, Tiling

Grid = tuple[int, int]
"""Columns and rows of tiles."""

BICUBIC = Pillow.Resampling.BICUBIC


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
    """The grid whose aspect ratio is closest to the image's.

    Of two that fit alike the later one wins if the image has more than half its pixels.
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


def grid_of(width: int, height: int, tiling: Tiling, detail: Detail = "auto") -> Grid:
    """The grid that an upright image of ``width`` by ``height`` pixels is cut into."""
    if detail == "low" or tiling.max_tiles == 1:
        return (1, 1)
    choices = grids(tiling.min_tiles, tiling.max_tiles)
    return closest_grid(width, height, choices, tiling.tile_px)


def tile_count(width: int, height: int, tiling: Tiling, detail: Detail = "auto") -> int:
    """How many tiles, the thumbnail included, an image becomes."""
    columns, rows = grid_of(width, height, tiling, detail)
    return columns * rows + (1 if tiling.thumbnail and columns * rows > 1 else 0)


def cut(picture: Pillow.Image, grid: Grid, tiling: Tiling) -> bytes:
    """An RGB picture's tiles as bytes, ``[tiles, tile_px, tile_px, 3]``, the thumbnail last."""
    side = tiling.tile_px
    columns, rows = grid
    scaled = picture.resize((columns * side, rows * side), BICUBIC)
    if grid == (1, 1):
        return _pixels(scaled)
    tiles = [
        scaled.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
        for row in range(rows)
        for column in range(columns)
    ]
    if tiling.thumbnail:
        tiles.append(picture.resize((side, side), BICUBIC))
    return b"".join(map(_pixels, tiles))


def _pixels(picture: Pillow.Image) -> bytes:
    """What ``tobytes`` gives, in one piece; that asks for blocks of 64 KiB and joins them."""
    width, height = picture.size
    encoder = Pillow._getencoder("RGB", "raw", "RGB")  # noqa: SLF001 - there is no public way
    encoder.setimage(picture.im, (0, 0, width, height))
    _, state, data = encoder.encode(width * height * 3)
    encoder.cleanup()
    if state < 0:
        raise RuntimeError(f"the pixels of a tile cannot be had: {state}")
    return bytes(data)
