"""Images cut in consumers: the same pixels as the model's own preprocessing, the right way up."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, ImageDraw
from PIL import Image as Pillow

from shared.errors import ImageTruncated
from shared.settings import ImageSettings
from workers.inference.engines.base import Detail, Tiling
from workers.inference.images import prepare
from workers.inference.orientation import orientation_of, upright, upright_size

SIDE = 448
TILING = Tiling(SIDE, 1, 12, thumbnail=True)
FAST, EXACT = ImageSettings(scaling="fast"), ImageSettings(scaling="exact")

MEAN_TOLERANCE = 0.6
"""Of 255, for photos decoded at reduced size; what docs/benchmarks.md and the README promise."""
MAX_TOLERANCE = 12


def photo(width: int, height: int, seed: int = 7) -> Pillow.Image:
    """Soft shades with fine grain, as a camera's."""
    dice = np.random.default_rng(seed)

    def noise(step: int) -> Pillow.Image:
        small = dice.integers(0, 256, (height // step + 2, width // step + 2, 3), dtype=np.uint8)
        return Pillow.fromarray(small).resize((width, height), Pillow.Resampling.BICUBIC)

    return Pillow.blend(noise(60), noise(5), 0.25)


def jpeg(picture: Pillow.Image, **options: object) -> bytes:
    """The picture as a camera would write it."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def published(data: bytes, columns: int, rows: int) -> NDArray[np.uint8]:
    """Tile by tile as the code published with the model cuts an image."""
    picture = Pillow.open(io.BytesIO(data)).convert("RGB")
    scaled = picture.resize((columns * SIDE, rows * SIDE))
    tiles = []
    for number in range(columns * rows):
        left, top = number % columns * SIDE, number // columns * SIDE
        tiles.append(np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE))))
    if len(tiles) > 1:
        tiles.append(np.asarray(picture.resize((SIDE, SIDE))))
    return np.stack(tiles)


def cut(data: bytes, settings: ImageSettings, detail: Detail = "auto") -> NDArray[np.uint8]:
    """The tiles that a consumer sends."""
    image = prepare(data, settings, TILING, detail)
    assert image.encoding == "tiles"
    assert image.source_bytes == len(data)
    return np.frombuffer(image.data, np.uint8).reshape(-1, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("size", "grid"), [((448, 448), (1, 1)), ((1920, 1080), (4, 2)), ((2400, 1800), (4, 3))]
)
def test_exact_scaling_gives_the_models_own_pixels(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """Every one of them."""
    data = jpeg(photo(*size))
    assert np.array_equal(cut(data, EXACT), published(data, *grid))


def test_fast_scaling_is_exact_where_nothing_is_to_be_gained() -> None:
    """An image about as large as its tiles is decoded in full."""
    data = jpeg(photo(1920, 1080))
    assert np.array_equal(cut(data, FAST), published(data, 4, 2))


@pytest.mark.parametrize("extra", [{}, {"progressive": True}, {"subsampling": 0}])
def test_fast_scaling_of_large_photos_stays_within_its_tolerance(extra: dict[str, object]) -> None:
    """Decoded at a quarter of the size, and hardly to be told from the exact pixels."""
    data = jpeg(photo(4000, 3000), **extra)
    fast, exact = cut(data, FAST, "low").astype(int), published(data, 1, 1).astype(int)
    difference = np.abs(fast - exact)
    assert 0 < difference.mean() <= MEAN_TOLERANCE
    assert difference.max() <= MAX_TOLERANCE


def test_scaling_left_to_the_engine_sends_the_file() -> None:
    """So does an engine that says nothing of tiles."""
    data = jpeg(photo(600, 300))
    for settings, tiling in ((ImageSettings(scaling="engine"), TILING), (FAST, None)):
        image = prepare(data, settings, tiling)
        assert (image.encoding, image.data, image.width, image.height) == ("file", data, 600, 300)


@pytest.mark.parametrize("settings", [FAST, EXACT])
def test_half_a_photo_is_an_error_at_any_scale(settings: ImageSettings) -> None:
    """Also when fewer pixels are decoded than there are."""
    data = jpeg(photo(4000, 3000))
    with pytest.raises(ImageTruncated):
        prepare(data[: len(data) // 2], settings, TILING, "low")


# --- the right way up -------------------------------------------------------------------------


def arrow() -> Pillow.Image:
    """Something that looks different in all eight ways to hold it."""
    drawn = Pillow.new("RGB", (1200, 600), "white")
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 0, 600, 120), fill="red")
    pen.rectangle((0, 120, 150, 600), fill="blue")
    return drawn


_BACK = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_90,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_270,
}


def held(orientation: int) -> Pillow.Image:
    """The arrow's pixels as a camera held that way stores them."""
    return arrow().transpose(_BACK[orientation]) if orientation in _BACK else arrow()


def with_exif(orientation: int, kind: str) -> bytes:
    """A file of those pixels that says how it was held."""
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    out = io.BytesIO()
    held(orientation).save(out, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int, kind: str) -> None:
    """However the camera was held, the grid and the pixels are those of the upright image."""
    image = prepare(with_exif(orientation, kind), FAST, TILING)
    assert (image.width, image.height) == (1200, 600)
    wanted = prepare(with_exif(1, kind), FAST, TILING)
    ours = np.frombuffer(image.data, np.uint8).astype(int)
    theirs = np.frombuffer(wanted.data, np.uint8).astype(int)
    assert len(ours) == 3 * SIDE * SIDE * 3  # two tiles and the thumbnail
    # Turning does not change which pixels JPEG's blocks blur together, but it does change where.
    assert np.abs(ours - theirs).mean() < 1


@pytest.mark.parametrize("orientation", [0, 9, 77, "right"])
def test_an_orientation_that_makes_no_sense_changes_nothing(orientation: int | str) -> None:
    """Nor is it a reason to refuse the image."""
    exif = Pillow.Exif()
    exif[ExifTags.Base.ImageDescription if orientation == "right" else 0x0112] = orientation
    out = io.BytesIO()
    arrow().save(out, "JPEG", exif=exif)
    image = prepare(out.getvalue(), FAST, TILING)
    assert (image.width, image.height) == (1200, 600)


def test_damaged_metadata_is_no_reason_to_refuse_the_pixels() -> None:
    """The tags of the EXIF block are overwritten."""
    data = bytearray(with_exif(6, "JPEG"))
    start = data.index(b"Exif\0\0") + 6
    data[start : start + 20] = b"\xff" * 20
    picture = Pillow.open(io.BytesIO(bytes(data)))
    assert orientation_of(picture) == 1
    assert upright(picture) is picture
    assert upright_size(picture) == picture.size
    prepare(bytes(data), FAST, TILING)
