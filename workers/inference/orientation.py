"""Which way up an image is: the EXIF orientation that cameras write instead of turning the pixels."""

from __future__ import annotations

from PIL import ExifTags
from PIL import Image as Pillow

_UPRIGHT = 1
_TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})


def orientation_of(picture: Pillow.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if there is none or it makes no sense.

    Damaged metadata says nothing about the pixels, so it is no reason to refuse an image. A PNG is
    decoded first; that raises what Pillow raises for damaged pixels.
    """
    if picture.format == "TIFF":
        return _UPRIGHT  # Pillow turns these itself while it decodes
    if picture.format == "PNG":
        # Pillow would do it below, where what it finds wrong with the pixels would be lost.
        picture.load()
    try:
        found = picture.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    # Pillow's readers of metadata raise whatever hostile bytes lead them to.
    except Exception:  # noqa: BLE001
        return _UPRIGHT
    return found if isinstance(found, int) and found in _TURNS else _UPRIGHT


def upright(picture: Pillow.Image, orientation: int | None = None) -> Pillow.Image:
    """The picture as it is to be looked at; the same object if it is upright already.

    ``orientation`` is the picture's, for who has asked already.
    """
    turn = _TURNS.get(orientation_of(picture) if orientation is None else orientation)
    return picture if turn is None else picture.transpose(turn)


def upright_size(picture: Pillow.Image, orientation: int | None = None) -> tuple[int, int]:
    """Width and height, in pixels, once it is upright; ``orientation`` as for ``upright``."""
    width, height = picture.size
    if (orientation_of(picture) if orientation is None else orientation) in _SIDEWAYS:
        return height, width
    return width, height
