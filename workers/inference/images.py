"""Verify an image to its last pixel, so that no engine ever meets a broken one.

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
from typing import NamedTuple

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
from workers.inference.image_structure import (
    check_jpeg,
    check_pixels,
    check_png,
    check_png_rows,
    check_tiff,
    check_webp,
)

MAX_READS = 200_000
"""Most reads a decoder may make of one file: bounds the loops of header parsers in Python."""


class DecodeRoom:
    """Bounds how many pixels are decoded at once by all threads of a process.

    A pixel takes 4 bytes while it is decoded (10 in a progressive JPEG, 16 in WebP). Threads are
    served in the order they ask, so that large images are not starved by small ones.
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
    if len(data) > settings.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data):,} bytes, more than the {settings.max_bytes:,} this server "
            "accepts; scale it down or compress it more"
        )
    source = _Source(data)
    try:
        return _decode(source, _sniff(data), settings.max_pixels, room)
    except ImageError:
        raise
    except (DecompressionBombError, MemoryError) as error:
        raise ImageTooLarge("the image is too large to decode; scale it down") from error
    except Exception as error:
        # A decoder fed with hostile bytes may raise anything; all of it means the same here.
        if source.ran_dry or "truncated" in str(error).lower():
            raise ImageTruncated from error
        raise ImageUnreadable(
            "the image is damaged, it cannot be decoded; save it again"
        ) from error


def _decode(
    source: _Source, found: _Format, max_pixels: int, room: DecodeRoom | None
) -> tuple[int, int]:
    data = source.getvalue()
    found.check(data, max_pixels)
    # Made directly, not through Image.open, which would also try other formats.
    image = found.decoder(source)
    check_pixels(*image.size, max_pixels)
    with room.take(image.width * image.height) if room else nullcontext():
        _load(image)
        if found is _PNG and _may_lack_rows(image):
            check_png_rows(data)
        return image.size


def _load(image: ImageFile.ImageFile) -> None:
    # Some libraries turn this on for the whole process, and half images would pass as whole ones.
    # Not restored: other threads may be decoding, and in this process images are always checked.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    image.load()
    image.crop((0, 0, 1, 1)).convert("RGB")


def _may_lack_rows(image: ImageFile.ImageFile) -> bool:
    """Whether rows may be missing that Pillow left blank without a word.

    It does so when a PNG's compressed data ends in good order but early. Anything in the last row
    proves otherwise, which spares most images the exact count; interlaced rows come in no order.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height)).tobytes()
    return bool(image.info.get("interlace")) or not last_row.strip(b"\0")


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


_JPEG = _Format(JpegImageFile, lambda data, _max_pixels: check_jpeg(data))
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
