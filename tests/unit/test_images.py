"""Verification of image bytes: what passes, what does not, and with which reason."""

from __future__ import annotations

import functools
import io
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile

from shared.errors import ImageError, ImageTooLarge, ImageTruncated, ImageUnreadable
from shared.settings import ImageSettings
from workers.inference.engines.base import Tiling
from workers.inference.images import DecodeRoom, prepare, verify

LIMITS = ImageSettings()
ADAM7 = [
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
]  # fmt: skip


def picture(mode: str = "RGB", width: int = 61, height: int = 43) -> Image.Image:
    """A picture whose every row differs, so that no decoder may skip the end of it."""
    if mode == "I;16":
        return Image.new(mode, (width, height), 40_000)
    rows = bytes((x * 7 + y * 13 + c * 50) % 256 for y in range(height) for x in range(width)
                 for c in range(3))  # fmt: skip
    return Image.frombytes("RGB", (width, height), rows).convert(mode)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """The bytes of a file of ``picture``."""
    file = io.BytesIO()
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with a right checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    """A grey 8-bit PNG that claims a size, made of any rows and extra chunks."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), rows, *extra)


def png_of(header: bytes, rows: bytes, *extra: bytes) -> bytes:
    """A PNG with any header."""
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *extra,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


GOOD = {
    "jpeg": encoded("JPEG"),
    "jpeg-grey": encoded("JPEG", "L"),
    "jpeg-cmyk": encoded("JPEG", "CMYK"),
    "jpeg-progressive": encoded("JPEG", progressive=True),
    "png": encoded("PNG"),
    "png-1-bit": encoded("PNG", "1"),
    "png-palette": encoded("PNG", "P"),
    "png-alpha": encoded("PNG", "RGBA"),
    "png-grey-alpha": encoded("PNG", "LA"),
    "png-16-bit": encoded("PNG", "I;16"),
    "webp": encoded("WEBP"),
    "webp-lossless-alpha": encoded("WEBP", "RGBA", lossless=True),
    "gif": encoded("GIF", "P"),
    "bmp": encoded("BMP"),
    "bmp-palette": encoded("BMP", "P"),
    "tiff": encoded("TIFF"),
    "tiff-lzw": encoded("TIFF", compression="tiff_lzw"),
    "tiff-deflate-cmyk": encoded("TIFF", "CMYK", compression="tiff_adobe_deflate"),
    "tiff-jpeg": encoded("TIFF", compression="jpeg"),
    "tiff-fax": encoded("TIFF", "1", compression="group4"),
    "tiff-16-bit": encoded("TIFF", "I;16"),
    "tiff-big": encoded("TIFF", big_tiff=True),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_whole_image_of_any_supported_kind_gives_its_size(name: str) -> None:
    """Grey, palette, alpha, CMYK and 16-bit are all fine: they can become RGB."""
    assert verify(GOOD[name], LIMITS) == (61, 43)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_single_pixel_is_an_image(kind: str) -> None:
    """The smallest image there is passes."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, kind)
    assert verify(file.getvalue(), LIMITS) == (1, 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_only_the_first_frame_counts(kind: str) -> None:
    """An animation passes as its first picture."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert verify(file.getvalue(), LIMITS) == (40, 30)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", GOOD)
def test_a_file_cut_short_is_truncated(name: str, share: float) -> None:
    """Whatever the kind and wherever the cut, the reason is the same."""
    data = GOOD[name]
    with pytest.raises(ImageTruncated):
        verify(data[: int(len(data) * share)], LIMITS)


@pytest.mark.parametrize("lost", [1, 2, 3, 10])
@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "png", "webp"])
def test_even_the_last_bytes_are_missed(name: str, lost: int) -> None:
    """A copy that stopped just before its end is not taken for whole."""
    with pytest.raises(ImageTruncated):
        verify(GOOD[name][:-lost], LIMITS)


@pytest.mark.parametrize("name", GOOD)
def test_a_library_that_allows_truncated_images_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing lmdeploy turns this on for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageTruncated):
        verify(GOOD[name][: int(len(GOOD[name]) * 0.8)], LIMITS)


@pytest.mark.parametrize("tiling", [None, Tiling(448, 1, 12, thumbnail=True)])
def test_a_png_with_a_row_that_makes_no_sense_is_damaged(tiling: Tiling | None) -> None:
    """All chunks are whole and everything inflates; also when it is to be cut into tiles."""
    rows = (b"\0" + b"\x55" * 8) * 4 + (b"\x09" + b"\x55" * 8) * 4
    with pytest.raises(ImageUnreadable):
        prepare(png(8, 8, rows), LIMITS, tiling)


def test_a_png_with_too_few_rows_is_refused_whatever_the_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All chunks are whole, only the pixels end early."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageTruncated):
        verify(png(8, 8, b"\0\x55\x55\x55\x55\x55\x55\x55\x55" * 4), LIMITS)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(("kind", "depth", "channels"), [(0, 1, 1), (2, 8, 3), (4, 16, 2)])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (8, 8), (13, 9)])
def test_a_png_needs_every_row_it_promises(
    interlace: int, kind: int, depth: int, channels: int, width: int, height: int
) -> None:
    """A black picture passes, and not when its last row is missing; in interlaced files too."""
    raw = 0
    for left, top, across, down in ADAM7 if interlace else [(0, 0, 1, 1)]:
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        raw += rows * (1 + (columns * channels * depth + 7) // 8) if columns else 0
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    assert verify(png_of(header, bytes(raw)), LIMITS) == (width, height)
    with pytest.raises(ImageTruncated):
        verify(png_of(header, bytes(raw - 1)), LIMITS)


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "empty"),
        (b"just some text, long enough to be a header", "not an image"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (bytes(1000), "not an image"),
        (b"BMW is a maker of cars, and this is a text about it", "not an image"),
    ],
)
def test_what_is_no_image_is_unreadable_and_the_message_says_what_it_is(
    data: bytes, hint: str
) -> None:
    """The content decides; the message helps a person who sent the wrong thing."""
    with pytest.raises(ImageUnreadable, match=hint):
        verify(data, LIMITS)


def test_other_formats_that_pillow_could_read_are_not_tried() -> None:
    """Fewer decoders meet hostile bytes."""
    file = io.BytesIO()
    picture().save(file, "PPM")
    with pytest.raises(ImageUnreadable):
        verify(file.getvalue(), LIMITS)


# --- size -------------------------------------------------------------------------------------


def huge_headers() -> dict[str, bytes]:
    """Small files that claim to be huge."""
    width = height = 50_000
    jpeg = bytearray(GOOD["jpeg"])
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", height, width)
    gif = bytearray(GOOD["gif"])
    gif[6:10] = struct.pack("<HH", width, height)
    bmp = bytearray(GOOD["bmp"])
    bmp[18:26] = struct.pack("<II", width, height)
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (49_999).to_bytes(3, "little") * 2
    tiff = bytearray(GOOD["tiff-lzw"])
    for value, new in ((61, width), (43, height)):
        tag = 256 if value == 61 else 257
        entry = tiff.index(struct.pack("<H", tag), struct.unpack_from("<I", tiff, 4)[0])
        struct.pack_into("<HII", tiff, entry + 2, 4, 1, new)
    return {
        "jpeg": bytes(jpeg),
        "png": png(width, height, bytes(100)),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "webp": b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp,
        "tiff": bytes(tiff),
    }


@pytest.mark.parametrize("name", huge_headers())
def test_a_huge_image_is_refused_before_anything_is_allocated(name: str) -> None:
    """50,000 x 50,000 pixels would be ten gigabytes."""
    data = huge_headers()[name]
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLarge, match="50000 x 50000"):
            verify(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_the_pixel_limit_is_ours_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turning Pillow's own limit off or to almost nothing changes nothing."""
    strict = ImageSettings(max_pixels=61 * 43 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageTooLarge):
        verify(GOOD["jpeg"], strict)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert verify(GOOD["jpeg"], ImageSettings(max_pixels=61 * 43)) == (61, 43)


def test_too_many_bytes_are_refused() -> None:
    """The limit holds for callers that did not read the bytes through a source."""
    with pytest.raises(ImageTooLarge, match="bytes"):
        verify(GOOD["jpeg"], ImageSettings(max_bytes=len(GOOD["jpeg"]) - 1))


@functools.cache
def text_bomb(kind: bytes) -> bytes:
    """A PNG chunk that inflates to 200 MB."""
    deflate = zlib.compressobj(9)
    body = b"".join(deflate.compress(bytes(10_000_000)) for _ in range(20)) + deflate.flush()
    before = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\x01\0\0\0"}[kind]
    return chunk(kind, before + body)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("switched_off", [False, True])
def test_png_metadata_that_inflates_without_end_is_refused(
    kind: bytes, switched_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a library has switched Pillow's own protection off."""
    if switched_off:
        monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 10**12)
    data = png(8, 8, bytes(9 * 8), text_bomb(kind))
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLarge, match="metadata"):
            verify(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_honest_png_metadata_passes() -> None:
    """A colour profile and texts of ordinary size are no reason to refuse."""
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(500_000)))
    text = chunk(b"iTXt", b"k\0\x01\0\0\0" + zlib.compress(b"a caption"))
    assert verify(png(8, 8, bytes(9 * 8), profile, text), LIMITS) == (8, 8)


def test_a_png_with_a_wrong_checksum_is_damaged() -> None:
    """A flipped bit in the pixels is found even where it would decode."""
    data = bytearray(png(8, 8, bytes(9 * 8)))
    data[data.index(b"IDAT") + 6] ^= 1
    with pytest.raises(ImageUnreadable, match="checksum"):
        verify(bytes(data), LIMITS)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """Each scan costs a pass over all pixels, and takes a few bytes only."""
    data = encoded("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageUnreadable, match="scans"):
        verify(data[:-2] + scan * 200 + data[-2:], LIMITS)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(b"\xff", id="a fill byte"),
        pytest.param(b"\xff\xd0", id="a restart marker"),
        pytest.param(b"\xff\x01", id="a marker that stands alone"),
    ],
)
def test_endless_scans_cannot_hide_behind_an_honest_header(between: bytes) -> None:
    """Whoever takes the next bytes for a length walks past the scans, to a decoy."""
    data = encoded("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    comment = b"\xff\xfe"
    skipped = 2 + (0xFE02 if between == b"\xff" else 0xFFFE)
    real = data[2:-2] + scan * 110 + data[-2:]
    plain = encoded("JPEG")
    decoy = plain[2:]
    # As a decoder reads it: fill or a lone marker, a comment of 512 bytes, then the real image.
    # As a naive reader does: one segment as long as the comment's marker says, then the decoy.
    hidden = between + comment + b"\2\0" + bytes(510) + real
    assert len(hidden) < skipped
    with pytest.raises(ImageUnreadable, match="scans"):
        verify(data[:2] + hidden + bytes(skipped - len(hidden)) + decoy, LIMITS)


def test_a_header_of_endless_parts_is_refused() -> None:
    """Each part is a turn of a loop in Python."""
    data = GOOD["jpeg"]
    with pytest.raises(ImageUnreadable, match="too many parts"):
        verify(data[:2] + b"\xff\xfe\0\x02" * 100_000 + data[2:], LIMITS)


def test_a_tiff_with_giant_tiles_is_refused() -> None:
    """A tile is reserved whole, however small the image in it."""
    data = bytearray(GOOD["tiff-lzw"])
    start = struct.unpack_from("<I", data, 4)[0]
    for tag, where in ((322, 2), (323, 2 + 12)):
        struct.pack_into("<HHII", data, start + where + 12 * 6, tag, 4, 1, 60_000)
    with pytest.raises(ImageTooLarge, match="60000 x 60000"):
        verify(bytes(data), LIMITS)


# --- hostile bytes ----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(GOOD)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=6),
    cut=st.floats(0, 1),
    cutting=st.booleans(),
)
def test_no_bytes_whatever_raise_anything_but_an_image_error(
    name: str, edits: list[tuple[float, bytes]], cut: float, cutting: bool
) -> None:
    """Random changes to a valid file either pass or are refused with a reason."""
    data = bytearray(GOOD[name])
    for place, new in edits:
        start = int(place * (len(data) - 1))
        data[start : start + len(new)] = new
    if cutting:
        del data[int(cut * len(data)) :]
    try:
        width, height = verify(bytes(data), ImageSettings(max_pixels=1_000_000))
    except ImageError:
        return
    assert 0 < width * height <= 1_000_000


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(
        [  # every kind that Pillow looks into
            b"IHDR",
            b"PLTE",
            b"tRNS",
            b"zTXt",
            b"iTXt",
            b"iCCP",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"pHYs",
            b"eXIf",
            b"gAMA",
            b"cHRM",
        ]
    ),
    body=st.binary(max_size=40),
)
def test_no_png_chunk_raises_anything_but_an_image_error(kind: bytes, body: bytes) -> None:
    """With right checksums, so that the decoder really sees the chunk."""
    try:
        verify(png(8, 8, bytes(9 * 8), chunk(kind, body)), ImageSettings(max_pixels=1_000_000))
    except ImageError:
        return


# --- room -------------------------------------------------------------------------------------


def test_decodes_wait_for_room_and_large_ones_are_not_starved() -> None:
    """A large image waits for the small one before it; a later small one waits behind it."""
    room = DecodeRoom(100)
    order: list[str] = []
    first_in, release = threading.Event(), threading.Event()

    def hold() -> None:
        with room.take(60):
            first_in.set()
            release.wait(10)
            order.append("first")

    def take(name: str, pixels: int) -> None:
        with room.take(pixels):
            order.append(name)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    assert first_in.wait(10)
    for name, pixels in (("large", 100), ("small", 10)):
        threads.append(threading.Thread(target=take, args=(name, pixels)))
        threads[-1].start()
        time.sleep(0.05)
    assert order == []
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "large", "small"]


def test_many_threads_verify_at_once() -> None:
    """Room for one image at a time still lets all of them through, with the right answers."""
    room = DecodeRoom(61 * 43)
    answers: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda d=data: answers.append(verify(d, LIMITS, room)))
        for data in GOOD.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [(61, 43)] * len(GOOD)


class Ledger(DecodeRoom):
    """Writes down what was asked for, and whether pixels were there before they were allowed."""

    def __init__(self) -> None:
        super().__init__(10**9)
        self.asked: list[int] = []

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Note and pass."""
        self.asked.append(pixels)
        with super().take(pixels):
            yield


@pytest.mark.parametrize(
    ("kind", "options", "pixels"),
    [("JPEG", {}, 500 * 500), ("JPEG", {"progressive": True}, 4000 * 4000)],
)
def test_room_is_taken_for_what_a_decoder_keeps(
    kind: str, options: dict[str, object], pixels: int
) -> None:
    """At an eighth of its size a plain JPEG takes little; a progressive one keeps everything."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000), "teal").save(file, kind, **options)
    room = Ledger()
    prepare(file.getvalue(), LIMITS, Tiling(224), "auto", room)
    assert room.asked == [pixels]


def test_no_png_is_decoded_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking which way up it is would decode it as well."""
    room = Ledger()
    loaded_with: list[int] = []
    load = PngImageFile.load

    def noted(image: PngImageFile) -> object:
        loaded_with.append(len(room.asked))
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", noted)
    prepare(encoded("PNG"), LIMITS, Tiling(448), "auto", room)
    assert loaded_with
    assert 0 not in loaded_with
