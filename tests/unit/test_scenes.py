"""The generator of two-shape scenes: seeded, captioned truly, its splits apart."""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from workers.inference.tiny import scenes


def _centre_of(picture: Image.Image, colour: str) -> tuple[float, float] | None:
    pixels = np.asarray(picture).astype(int)
    near = np.abs(pixels - np.array(scenes.COLOURS[colour])).max(axis=-1) <= 16
    rows, columns = np.nonzero(near)
    return (float(columns.mean()), float(rows.mean())) if len(rows) > 20 else None


def test_an_index_always_gives_the_same_scene() -> None:
    """A scene depends on nothing but its split and index."""
    first, again = scenes.scene("train", 11), scenes.scene("train", 11)
    assert first.caption == again.caption
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != scenes.scene("train", 12).image.tobytes()


def test_no_image_is_in_both_splits() -> None:
    """The pictures of the two splits have different digests."""
    digests = {
        split: {hashlib.sha256(one.image.tobytes()).digest() for one in scenes.scenes(split, 150)}
        for split in ("train", "held_out")
    }
    assert len(digests["train"]) == len(digests["held_out"]) == 150
    assert not digests["train"] & digests["held_out"]


def test_captions_name_what_is_drawn_and_where() -> None:
    """Each named colour is in the picture, the first one left of or above the second."""
    told_apart = 0
    for one in scenes.scenes("held_out", 60):
        words = one.caption.split()
        first, second = words[1], words[-2]
        here, there = _centre_of(one.image, first), _centre_of(one.image, second)
        assert here is not None
        assert there is not None
        if first == second:
            continue
        axis = 0 if "left of" in one.caption else 1
        assert here[axis] < there[axis], one.caption
        told_apart += 1
    assert told_apart > 30


def test_png_keeps_every_pixel_and_jpeg_nearly() -> None:
    """Both encodings open as the picture they were made from."""
    picture = scenes.scene("held_out", 3).image
    png = Image.open(BytesIO(scenes.encoded(picture, "png")))
    jpeg = Image.open(BytesIO(scenes.encoded(picture, "jpeg")))
    assert (png.format, jpeg.format) == ("PNG", "JPEG")
    assert png.tobytes() == picture.tobytes()
    difference = np.abs(np.asarray(jpeg).astype(int) - np.asarray(picture).astype(int))
    assert 0 < difference.mean() < 6


def test_the_command_writes_images_beside_their_captions(tmp_path: Path) -> None:
    """Every line of captions.jsonl names a file that is there, of the size asked for."""
    scenes.main([str(tmp_path), "--count", "4", "--split", "held_out", "--size-px", "96"])
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [
        one.caption for one in scenes.scenes("held_out", 4, size_px=96)
    ]
    assert {Path(line["image"]).suffix for line in lines} == {".jpg", ".png"}
    assert all(Image.open(tmp_path / line["image"]).size == (96, 96) for line in lines)
