"""The parts of the image-set benchmark: its pictures, and plain Python, which it compares with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import plain_python
from benchmarks.image_sets import PROMPT, check_shards
from benchmarks.pictures import (
    BROKEN_EVERY,
    Pictures,
    is_broken,
    name_of,
    number_of,
    write_folder,
    write_tar,
)
from benchmarks.plain_python import Job
from shared.errors import ImageTruncated
from shared.settings import ImageSettings
from workers.inference.engines.base import Tiling
from workers.inference.images import prepare
from workers.inference.orientation import orientation_of

COUNT = 300
SIDE_PX = 56


def test_pictures_are_the_same_in_every_run_and_no_two_are_alike() -> None:
    """Also those that share their pixels."""
    files = [Pictures().file(number) for number in range(2)]
    pictures = Pictures()
    assert files == [pictures.file(number) for number in range(2)]
    assert len({pictures.file(number) for number in range(3000)}) == 3000


def test_pictures_lie_in_every_way() -> None:
    """All orientations that EXIF has are among those that are drawn."""
    pictures = Pictures()
    found = {orientation_of(Image.open(io.BytesIO(pictures.file(number)))) for number in range(256)}
    assert found == set(range(1, 9))


def test_names_are_in_order_and_say_their_number() -> None:
    """Over the ends of folders."""
    numbers = [0, 1, 999, 1000, 99_999, 100_000, 9_999_999]
    names = [name_of(number) for number in numbers]
    assert names == sorted(names)
    assert [number_of(name) for name in names] == numbers


def test_a_folder_and_a_tar_hold_the_same_files(tmp_path: Path) -> None:
    """Byte by byte."""
    assert write_folder(tmp_path / "folder", COUNT) == write_tar(tmp_path / "set.tar", COUNT)
    with tarfile.open(tmp_path / "set.tar") as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        assert [*members] == [name_of(number) for number in range(COUNT)]
        for name, stream in members.items():
            assert stream is not None
            assert stream.read() == (tmp_path / "folder" / name).read_bytes()


def test_plain_python_makes_the_same_pixels_as_a_consumer() -> None:
    """Else the two would not be doing the same work."""
    pictures, settings = Pictures(), ImageSettings()
    for number in range(256):
        data = pictures.file(number)
        if is_broken(number):
            continue
        ours = prepare(data, settings, Tiling(SIDE_PX))
        assert plain_python.scaled(data, SIDE_PX).tobytes() == ours.data, number


def test_both_find_the_broken_ones() -> None:
    """And name the same reason."""
    number = next(filter(is_broken, range(BROKEN_EVERY)))
    data = Pictures().file(number)
    with pytest.raises(ImageTruncated):
        prepare(data, ImageSettings(), Tiling(SIDE_PX))
    with pytest.raises(OSError, match="truncated"):
        plain_python.scaled(data, SIDE_PX)


@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_plain_python_answers_every_image(
    tmp_path: Path, kind: str, reencode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder and of a tar, in several shards, with the pictures if they are wanted."""
    monkeypatch.setattr(plain_python, "SHARD_ITEMS", 64)
    write = {"folder": write_folder, "tar": write_tar}[kind]
    write(tmp_path / "set", COUNT)
    output = tmp_path / "out"
    plain_python.run(Job(tmp_path / "set", output, PROMPT, SIDE_PX, reencode))
    check_shards(output, COUNT, SIDE_PX)
    written = 0
    for shard in output.glob("*.tar"):
        with tarfile.open(shard) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                assert Image.open(stream).size == (SIDE_PX, SIDE_PX)
                written += 1
    assert written == (COUNT - sum(map(is_broken, range(COUNT))) if reencode else 0)


def test_a_missing_or_wrong_line_is_noticed(tmp_path: Path) -> None:
    """What is measured is what was done."""
    good = {"name": name_of(0), "caption": PROMPT, "tokens": 9, "bytes": 3 * SIDE_PX**2}
    shard = tmp_path / "000000.jsonl"
    shard.write_text(json.dumps(good))
    check_shards(tmp_path, 1, SIDE_PX)
    with pytest.raises(AssertionError, match="1 of 2 images have no line"):
        check_shards(tmp_path, 2, SIDE_PX)
    shard.write_text(json.dumps(good | {"caption": "something else"}))
    with pytest.raises(AssertionError, match="something else"):
        check_shards(tmp_path, 1, SIDE_PX)
    shard.write_text(f"{json.dumps(good)}\n{json.dumps(good)}")
    with pytest.raises(AssertionError, match="two lines"):
        check_shards(tmp_path, 1, SIDE_PX)
