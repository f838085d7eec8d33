"""What is known of synced image sets, in segments that appear whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from shared.caption_sets import (
    Asking,
    Caption,
    CaptionSet,
    SegmentWriter,
    Sighting,
    add_generation,
    segments,
    set_id,
)
from shared.captions import CaptionSource, ImagePlace, Sync
from shared.errors import StorageFailed

CONTENT = "ab" * 32


def key(number: int) -> bytes:
    """A key of its own."""
    return number.to_bytes(32, "big")


def caption(text: str) -> Caption:
    """A caption that says this."""
    return Caption(text, "stop", 258, 2, 1, "batch_1")


def learn(folder: Path, generation: int, captions: dict[int, str]) -> int | None:
    """Add a generation with captions by number, and a sighting for each."""

    def fill(writer: SegmentWriter) -> None:
        for number, text in captions.items():
            writer.add_sighting(key(number)[-16:], Sighting(number, generation, key(number)))
            writer.add_caption(key(number), caption(text))

    return add_generation(folder, generation, fill)


def names(folder: Path) -> list[str]:
    """Everything in the set's folder."""
    return sorted(path.name for path in folder.iterdir())


def texts(folder: Path, *numbers: int) -> dict[int, str]:
    """The captions of these numbers that are known."""
    with CaptionSet(folder) as known:
        found = known.captions(key(number) for number in numbers)
        assert known.known(key(number) for number in numbers) == set(found)
    return {int.from_bytes(at, "big"): value.text for at, value in found.items()}


def test_what_was_learned_last_counts(tmp_path: Path) -> None:
    """Over segments that were merged, and over those that were not."""
    folder = tmp_path / "set"
    assert texts(folder, 1) == {}
    learn(folder, 1, dict.fromkeys(range(20), "old"))
    learn(folder, 2, {3: "new"})
    learn(folder, 3, {3: "newer", 4: "newer"})
    assert texts(folder, 2, 3, 4, 99) == {2: "old", 3: "newer", 4: "newer"}
    with CaptionSet(folder) as known:
        assert known.generation == 3
        at = key(3)[-16:]
        assert known.sightings([at, key(99)[-16:]]) == {at: Sighting(3, 3, key(3))}


def test_a_small_generation_does_not_copy_a_large_segment(tmp_path: Path) -> None:
    """And however many there are, few segments are left."""
    folder = tmp_path / "set"
    learn(folder, 1, dict.fromkeys(range(1000), "old"))
    large = segments(folder)[0].path.stat()
    for generation in range(2, 60):
        learn(folder, generation, {generation: str(generation)})
        assert len(segments(folder)) < 10
    found = segments(folder)[0].path.stat()
    assert (found.st_ino, found.st_mtime_ns) == (large.st_ino, large.st_mtime_ns)
    assert texts(folder, 1, 17, 59, 999) == {1: "old", 17: "17", 59: "59", 999: "old"}


def test_a_generation_is_written_once(tmp_path: Path) -> None:
    """A finalizer that is repeated finds what the first one wrote."""
    folder = tmp_path / "set"
    assert learn(folder, 1, {1: "first"}) == 2
    assert learn(folder, 1, {1: "again"}) is None
    assert texts(folder, 1) == {1: "first"}
    assert learn(folder, 2, {}) == 0
    assert names(folder) == ["00000001-00000001.sqlite"]


def test_a_writer_that_wakes_up_late_changes_nothing(tmp_path: Path) -> None:
    """What it writes is covered by what came after it, and goes with the next generation."""
    folder = tmp_path / "set"
    learn(folder, 1, {1: "first"})
    shutil.copy(folder / "00000001-00000001.sqlite", tmp_path / "late")
    learn(folder, 2, {1: "second", 2: "second"})
    assert names(folder) == ["00000001-00000002.sqlite"]
    shutil.copy(tmp_path / "late", folder / "00000001-00000001.sqlite")
    assert texts(folder, 1) == {1: "second"}
    learn(folder, 3, {3: "third"})
    assert "00000001-00000001.sqlite" not in names(folder)


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Its half-written file goes once its generation is there."""
    folder = tmp_path / "set"

    def die(writer: SegmentWriter) -> None:
        writer.add_caption(key(1), caption("half"))
        [half] = folder.glob(".*.part")
        shutil.copy(half, folder / ".1.0123abcd.part")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_generation(folder, 1, die)
    assert names(folder) == [".1.0123abcd.part"]
    assert texts(folder, 1) == {}
    learn(folder, 1, {1: "whole"})
    assert names(folder) == ["00000001-00000001.sqlite"]


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    """With what to do about it."""
    folder = tmp_path / "set"
    learn(folder, 1, dict.fromkeys(range(100), "x" * 500))
    path = segments(folder)[0].path
    path.write_bytes(b"no database" * 100)
    with pytest.raises(StorageFailed, match=r"set.*move that folder away"):
        texts(folder, 1)


def asked(**fields: object) -> CaptionSource:
    """A synced caption job."""
    values = {"images": [ImagePlace(path="/a")], "model": "m", "prompt": "p", "sync": Sync()}
    return CaptionSource(**{**values, **fields})  # type: ignore[arg-type]


def test_all_that_is_asked_is_in_the_key() -> None:
    """Image, model, words, parameters; not where the image is."""
    other = [
        asked(prompt="q"),
        asked(system="s"),
        asked(detail="low"),
        asked(seed=1),
        asked(max_tokens=5),
        asked(temperature=0.0),
    ]
    base = Asking(asked(), "m 1 1").key(CONTENT, None)
    keys = {Asking(source, "m 1 1").key(CONTENT, None) for source in other}
    keys |= {
        Asking(asked(), "m 2 1").key(CONTENT, None),
        Asking(asked(), "m 1 1").key("cd" * 32, None),
    }
    assert len(keys) == len(other) + 2
    assert base not in keys
    moved = asked(images=[ImagePlace(path="/b")], sync=Sync("name"))
    assert Asking(moved, "m 1 1").key(CONTENT, None) == base
    template = Asking(asked(prompt=None, template="say {txt}"), "m 1 1")
    assert template.key(CONTENT, {"txt": "a"}) != template.key(CONTENT, {"txt": "b"})
    assert template.key(CONTENT, {"txt": "a"}) == Asking(asked(prompt="say a"), "m 1 1").key(
        CONTENT, None
    )


def test_a_set_is_its_owners_by_name_or_by_places() -> None:
    """What else is asked is no part of it."""
    assert set_id("ann", asked()) == set_id("ann", asked(prompt="q"))
    named = asked(sync=Sync("x"))
    moved = msgspec.structs.replace(named, images=[ImagePlace(path="/b")])
    assert set_id("ann", named) == set_id("ann", moved)
    others = [
        set_id("bob", asked()),
        set_id("bob", named),
        set_id("ann", named),
        set_id("ann", asked()),
    ]
    assert len(set(others)) == 4
    assert set_id("ann", asked(images=[ImagePlace(path="/b")])) not in others
