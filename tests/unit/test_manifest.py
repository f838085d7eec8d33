"""A manifest as it lies on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import StorageFailed
from shared.manifest import Chunk, Manifest, ManifestWriter, Plan


def written(tmp_path: Path, count: int, duplicates: list[int]) -> tuple[Manifest, list[Chunk]]:
    """A manifest of so many chunks."""
    chunks = [Chunk(i, i << 33, 100 + i, 1 + (i << 32), i % 7) for i in range(count)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    writer = ManifestWriter(tmp_path, scratch)
    assert writer.write_chunks(iter(chunks)) == count
    writer.write_duplicates(duplicates)
    writer.finish(Plan("m", count, 5))
    return Manifest(tmp_path), chunks


def test_chunks_are_read_one_by_one_or_all(tmp_path: Path) -> None:
    """Offsets and lines beyond four gigabytes, more chunks than one read brings."""
    manifest, chunks = written(tmp_path, 5000, [])
    assert manifest.plan == Plan("m", 5000, 5)
    assert manifest.chunk(4321) == chunks[4321]
    assert list(manifest.chunks()) == chunks
    with pytest.raises(StorageFailed, match="no chunk 5000"):
        manifest.chunk(5000)


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [(1, 10, {3, 5, 8}), (3, 5, {3, 5}), (4, 4, set()), (9, 99, set()), (8, 8, {8})],
)
def test_duplicates_are_looked_up_by_range(
    tmp_path: Path, first: int, last: int, found: set[int]
) -> None:
    """Both ends included."""
    manifest, _ = written(tmp_path, 1, [3, 5, 8])
    assert manifest.duplicates(first, last) == found


def test_an_empty_list_of_duplicates_is_read(tmp_path: Path) -> None:
    """Hashes that were equal by chance leave one."""
    manifest, _ = written(tmp_path, 1, [])
    assert manifest.duplicates(1, 10) == frozenset()


def test_before_it_is_finished_there_is_none(tmp_path: Path) -> None:
    """What a killed planner left is not a plan."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ManifestWriter(tmp_path, scratch).write_chunks(iter([]))
    assert not Manifest.exists(tmp_path)
    with pytest.raises(StorageFailed, match="missing"):
        Manifest(tmp_path)


def test_the_first_one_stays(tmp_path: Path) -> None:
    """Whoever finishes second is told the plan that counts."""
    manifest, chunks = written(tmp_path, 3, [])
    scratch = tmp_path / "late"
    scratch.mkdir()
    late = ManifestWriter(tmp_path, scratch)
    late.write_chunks(iter(chunks[:1]))
    assert late.finish(Plan("m", 1, 5)) == manifest.plan
    assert list(Manifest(tmp_path).chunks()) == chunks
