"""Verify an image to its last pixel, and cut it for its engine in the same pass.

No engine ever meets a broken image, and none that says how it wants images cut has to decode one.

The content decides what a file is; its name and its declared type do not count. The format's own
structure is checked first (``image_structure``), then Pillow decodes the first frame in full. Only
the six decoders named here are ever used, whatever else is registered with Pillow, and Pillow's
process-wide switches are not relied upon.

Not found here: a JPEG or GIF whose pixel data is wrong but complete (libjpeg paints such blocks
grey and does not tell Pillow).
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol, TypeVar

from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shared.errors import ImageError, ImageTooLarge, ImageTruncated, ImageUnreadable
from shared.settings import ImageSettings
from workers.inference.engines.base import Detail, Image, Tiling
from workers.inference.image_structure import (
    check_jpeg,
    check_pixels,
    check_png,
    check_png_rows,
    check_tiff,
    check_webp,
    is_one_scan,
)
from workers.inference.orientation import orientation_of, upright, upright_size
from workers.inference.tiling import Grid, cut, grid_of

T_co = TypeVar("T_co", covariant=True)

REDUCED_MARGIN = 1.5
"""How much larger than its tiles a JPEG stays when it is decoded at reduced size: scaled down by
less, what is left shows that it was scaled twice."""

MAX_READS = 200_000
"""Most reads a decoder may make of one file: bounds the loops of header parsers in Python."""


class DecodeRoom:
    """Bounds how many pixels are decoded at once by all threads of a process.

    A pixel takes 4 bytes while it is decoded (10 in a progressive JPEG, at whatever size it is
    decoded, and 16 in WebP), and 4 more while it is turned upright or converted. Threads are served
    in the order they ask, so that large images are not starved by small ones.
    """

    def __init__(self, max_pixels: int) -> None:
        self._free = self._max = max_pixels
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for ``pixels`` (at most all of it) and hold it."""
        pixels = min(pixels, self._max)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def verify(data: bytes, settings: ImageSettings, room: DecodeRoom | None = None) -> tuple[int, int]:
    """Decode the whole image (first frame) and give its width and height in pixels.

    ``data`` is an encoded file. ``room``, when given, is shared between the threads of a process.

    Raises: ImageUnreadable, ImageTruncated or ImageTooLarge; nothing else, whatever the bytes.
    """
    return _decoded(data, settings, room, _Whole())


def prepare(
    data: bytes,
    settings: ImageSettings,
    tiling: Tiling | None,
    detail: Detail = "auto",
    room: DecodeRoom | None = None,
) -> Image:
    """Verify an encoded file and make of it what the engine wants: tiles, or the file itself.

    The tiles are those of the upright image. With ``settings.scaling`` ``exact`` they are, pixel
    for pixel, what the model's published preprocessing makes of it; with ``fast`` a JPEG much
    larger than its tiles is decoded at a half, a quarter or an eighth of its size, and stays half as
    large again as they are.

    Raises: as ``verify``.
    """
    if tiling is None or settings.scaling == "engine":
        width, height = verify(data, settings, room)
        return Image(data, "file", width, height, detail, len(data))
    tiles = _Tiles(tiling, detail, reduce=settings.scaling == "fast")
    cut_up, width, height = _decoded(data, settings, room, tiles)
    return Image(cut_up, "tiles", width, height, detail, len(data), tiling.tile_px)


class UprightFile(NamedTuple):
    """A verified image for programs that do not look at its orientation.

    ``data`` is the encoded file, ``format`` its name in Pillow's words, ``width`` and ``height``
    are in pixels.
    """

    data: bytes
    format: str
    width: int
    height: int


def upright_file(
    data: bytes, settings: ImageSettings, room: DecodeRoom | None = None
) -> UprightFile:
    """Verify an encoded file and turn it upright; only one that has to be turned is encoded anew.

    A turned JPEG is a JPEG again, of high quality; anything else becomes a PNG.
    Raises: as ``verify``.
    """
    turned, name, width, height = _decoded(data, settings, room, _Upright())
    return UprightFile(data if turned is None else turned, name, width, height)


class _Use(Protocol[T_co]):
    """What is wanted of an image: a word with the decoder, then something made of the pixels."""

    def before(self, image: ImageFile.ImageFile) -> None:
        """Called with a JPEG's header read; may ask the decoder for fewer pixels."""
        ...

    def after(self, image: ImageFile.ImageFile) -> T_co:
        """Called once with every pixel there."""
        ...


class _Whole(_Use[tuple[int, int]]):
    """Only to know that it can be decoded."""

    def before(self, image: ImageFile.ImageFile) -> None:
        """Ask for every pixel."""

    def after(self, image: ImageFile.ImageFile) -> tuple[int, int]:
        """Width and height."""
        image.crop((0, 0, 1, 1)).convert("RGB")
        return image.size


class _Upright(_Use[tuple[bytes | None, str, int, int]]):
    """The image turned and encoded, or ``None`` if it is upright; its format, width and height."""

    def before(self, image: ImageFile.ImageFile) -> None:
        """Ask for every pixel."""

    def after(self, image: ImageFile.ImageFile) -> tuple[bytes | None, str, int, int]:
        """Turn and encode, if need be."""
        image.crop((0, 0, 1, 1)).convert("RGB")
        picture = upright(image)
        name = image.format or "PNG"
        if picture is image:
            return None, name, *image.size
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        name = name if name == "JPEG" else "PNG"
        file = io.BytesIO()
        picture.save(file, name, **_ENCODING[name])
        return file.getvalue(), name, *picture.size


_ENCODING: dict[str, dict[str, int]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {"compress_level": 1},
}


class _Tiles(_Use[tuple[bytes, int, int]]):
    """The tiles of the upright image, and its width and height."""

    def __init__(self, tiling: Tiling, detail: Detail, *, reduce: bool) -> None:
        self._tiling = tiling
        self._detail = detail
        self._reduce = reduce
        self._orientation: int | None = None
        self._size: tuple[int, int] | None = None

    def before(self, image: ImageFile.ImageFile) -> None:
        """Let a JPEG be decoded no larger than its grid needs."""
        if self._reduce:
            self._orientation = orientation_of(image)
            self._size = upright_size(image, self._orientation)
            columns, rows = self._grid(self._size)
            side = int(self._tiling.tile_px * REDUCED_MARGIN)
            wanted = columns * side, rows * side
            # In the decoder's own orientation.
            image.draft(None, wanted if image.size == self._size else wanted[::-1])

    def after(self, image: ImageFile.ImageFile) -> tuple[bytes, int, int]:
        """Turn, convert, scale and cut."""
        if self._orientation is None:
            self._orientation = orientation_of(image)
        size = self._size or upright_size(image, self._orientation)
        picture = upright(image, self._orientation)
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return cut(picture, self._grid(size), self._tiling), *size

    def _grid(self, size: tuple[int, int]) -> Grid:
        return grid_of(*size, self._tiling, self._detail)


def _decoded(
    data: bytes, settings: ImageSettings, room: DecodeRoom | None, use: _Use[T_co]
) -> T_co:
    if len(data) > settings.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data):,} bytes, more than the {settings.max_bytes:,} this server "
            "accepts; scale it down or compress it more"
        )
    found = _sniff(data)
    one_scan = found is _JPEG and is_one_scan(data)
    # Such a JPEG has all its headers, and a parser that only goes forward cannot read more often
    # than there are bytes: nobody has to count, which would take a tenth of a small one's time.
    plain = one_scan and len(data) <= MAX_READS
    source = io.BytesIO(data) if plain else _Source(data)
    try:
        return _decode(source, data, found, settings.max_pixels, room, use, one_scan=one_scan)
    except ImageError:
        raise
    except (DecompressionBombError, MemoryError) as error:
        raise ImageTooLarge("the image is too large to decode; scale it down") from error
    except Exception as error:
        # A decoder fed with hostile bytes may raise anything; all of it means the same here.
        ran_dry = isinstance(source, _Source) and source.ran_dry
        if ran_dry or "truncated" in str(error).lower():
            raise ImageTruncated from error
        raise ImageUnreadable(
            "the image is damaged, it cannot be decoded; save it again"
        ) from error


def _decode(
    source: io.BytesIO,
    data: bytes,
    found: _Format,
    max_pixels: int,
    room: DecodeRoom | None,
    use: _Use[T_co],
    *,
    one_scan: bool,
) -> T_co:
    if not one_scan:
        found.check(data, max_pixels)
    # Made directly, not through Image.open, which would also try other formats.
    image = found.decoder(source)
    check_pixels(*image.size, max_pixels)
    pixels = image.width * image.height
    # Only here, where a header is all it takes: of a PNG Pillow knows the orientation, which may
    # stand behind the pixels, only after it has decoded them.
    if isinstance(image, JpegImageFile):
        use.before(image)
        # In one go: fed piece by piece, the decoder waits for Python's lock before each piece.
        image.decodermaxblock = max(image.decodermaxblock, len(data))
        # Else the coefficients of the whole image are kept, however few pixels are made of them.
        if one_scan:
            pixels = image.width * image.height
    with room.take(pixels) if room else nullcontext():
        # Some libraries turn this on for the whole process, and half images would pass as whole
        # ones. Not restored: other threads may be decoding, and here images are always checked.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image.load()
        if found is _PNG and _may_lack_rows(image):
            check_png_rows(data)
        return use.after(image)


def _may_lack_rows(image: ImageFile.ImageFile) -> bool:
    """Whether rows may be missing that Pillow left blank without a word.

    It does so when a PNG's compressed data ends in good order but early. Anything in the last row
    proves otherwise, which spares most images the exact count; interlaced rows come in no order.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    return bool(image.info.get("interlace")) or not last_row.strip(b"\0")


class _Jpeg(JpegImageFile):
    """Without a look for the resolution, which nobody asks for and which costs a fifth of opening."""

    def _read_dpi_from_exif(self) -> None:
        pass


class _Source(io.BytesIO):
    """The bytes as a decoder reads them: counts reads, and notes one past the end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ran_dry = False
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ImageUnreadable("the image is made of too many parts; save it again")
        piece = super().read(size)
        if not piece and size != 0:
            self.ran_dry = True
        return piece


# --- what the bytes are -----------------------------------------------------------------------


class _Format(NamedTuple):
    decoder: Callable[[io.BytesIO], ImageFile.ImageFile]
    check: Callable[[bytes, int], None]


def _no_check(_data: bytes, _max_pixels: int) -> None:
    """For formats whose decoder allocates nothing before the pixels are asked for."""


_JPEG = _Format(_Jpeg, lambda data, _max_pixels: check_jpeg(data))
_PNG = _Format(PngImageFile, check_png)
_GIF = _Format(GifImageFile, _no_check)
_BMP = _Format(BmpImageFile, _no_check)
_TIFF = _Format(TiffImageFile, check_tiff)
_WEBP = _Format(WebPImageFile, check_webp)

_SIGNATURES: tuple[tuple[bytes, _Format], ...] = (
    (b"\xff\xd8\xff", _JPEG),
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\0", _TIFF),
    (b"MM\0*", _TIFF),
    (b"II+\0", _TIFF),
    (b"MM\0+", _TIFF),
)
_BMP_HEADER_BYTES = frozenset({12, 40, 52, 56, 64, 108, 124})
"""Two letters are a weak signature, so the size of the header that follows must be a known one."""


def _sniff(data: bytes) -> _Format:
    for signature, found in _SIGNATURES:
        if data.startswith(signature):
            return found
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _WEBP
    if data[:2] == b"BM" and data[15:18] == bytes(3) and data[14] in _BMP_HEADER_BYTES:
        return _BMP
    raise ImageUnreadable(_what_it_is_instead(data))


def _what_it_is_instead(data: bytes) -> str | None:
    if not data:
        return "the image is empty (0 bytes)"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "this is an HTML page, not an image; give the address of the image itself"
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in data[:4096]):
        return "SVG drawings are not supported; export it as PNG"
    if data[4:8] == b"ftyp":
        return "HEIC, AVIF and videos are not supported; save it as JPEG or PNG"
    if start.startswith(b"%pdf"):
        return "PDF files are not supported; save the page as PNG"
    return None
