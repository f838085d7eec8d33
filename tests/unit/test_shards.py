"""Shards as they lie on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import StorageFailed
from shared.shards import (
    ShardHeader,
    copy_errors,
    copy_output,
    find_shards,
    read_header,
    shard_path,
    write_shard,
)

OUTPUT = b'{"a": 1}\n{"b": 2}\n'
ERRORS = b'{"c": 3}\n'
HEADER = ShardHeader(len(OUTPUT), len(ERRORS), 2, 1, 10, 20)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of chunk 7, written under token 3."""
    (tmp_path / "shards").mkdir()
    path = shard_path(tmp_path, 7, 3)
    write_shard(path, HEADER, OUTPUT, ERRORS)
    return path


def test_both_parts_come_back(shard: Path, tmp_path: Path) -> None:
    """Appended to what is there."""
    assert read_header(shard) == HEADER
    target = tmp_path / "out"
    with open(target, "wb", buffering=0) as stream:
        stream.write(b"before\n")
        copy_output(shard, HEADER, stream)
        copy_errors(shard, HEADER, stream)
    assert target.read_bytes() == b"before\n" + OUTPUT + ERRORS


def test_a_shard_may_be_empty_in_either_part(tmp_path: Path) -> None:
    """All answered or all failed."""
    (tmp_path / "shards").mkdir()
    path = shard_path(tmp_path, 0, 1)
    header = ShardHeader(0, len(ERRORS), 0, 1, 0, 0)
    write_shard(path, header, b"", ERRORS)
    target = tmp_path / "out"
    with open(target, "wb", buffering=0) as stream:
        copy_output(path, header, stream)
        assert stream.tell() == 0
        copy_errors(path, header, stream)
    assert target.read_bytes() == ERRORS


def test_the_largest_numbers_fit_the_header(tmp_path: Path) -> None:
    """It has a fixed length."""
    (tmp_path / "shards").mkdir()
    header = ShardHeader(0, 0, *[2**63 - 1] * 5)
    path = shard_path(tmp_path, 99_999_999, 2**32 - 1)
    write_shard(path, header, b"", b"")
    assert read_header(path) == header
    assert list(find_shards(tmp_path)) == [(99_999_999, 2**32 - 1, path)]


@pytest.mark.parametrize("size", [0, 10, 255, 256, -1])
def test_a_cut_shard_is_noticed(shard: Path, size: int) -> None:
    """Wherever it was cut."""
    data = shard.read_bytes()
    shard.write_bytes(data[:size])
    with pytest.raises(StorageFailed, match="damaged"):
        read_header(shard)


def test_a_missing_or_longer_shard_is_noticed(shard: Path) -> None:
    """Neither is what was committed."""
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(StorageFailed):
        read_header(shard)
    shard.unlink()
    with pytest.raises(StorageFailed):
        read_header(shard)


def test_only_whole_shards_are_found(shard: Path, tmp_path: Path) -> None:
    """Not what a killed writer left; no folder means none."""
    (shard.parent / f".{shard.name}.12ab.part").touch()
    (shard.parent / "notes.txt").touch()
    assert list(find_shards(tmp_path)) == [(7, 3, shard)]
    assert list(find_shards(tmp_path / "elsewhere")) == []


def test_a_header_grows_with_what_it_counts(tmp_path: Path) -> None:
    """In blocks, and both parts are found behind it, whatever its length."""
    (tmp_path / "shards").mkdir()
    for chunk, kinds in enumerate(range(0, 60, 3)):
        counts = {f"failed:reason_{number}": number for number in range(kinds)}
        header = ShardHeader(len(OUTPUT), len(ERRORS), 2, 1, 10, 20, counts=counts)
        path = shard_path(tmp_path, chunk, 1)
        write_shard(path, header, OUTPUT, ERRORS)
        assert read_header(path) == header
        assert header.header_bytes % 256 == 0
        target = tmp_path / "out"
        with open(target, "wb", buffering=0) as stream:
            copy_output(path, header, stream)
            copy_errors(path, header, stream)
        assert target.read_bytes() == OUTPUT + ERRORS


def test_a_shard_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its header has no counts, and says that there are no images."""
    (tmp_path / "shards").mkdir()
    path = shard_path(tmp_path, 0, 1)
    line = (
        b'{"output_bytes":%d,"error_bytes":0,"completed":2,"failed":0,"prompt_tokens":1,'
        b'"completion_tokens":1,"images":0}' % len(OUTPUT)
    )
    path.write_bytes(line.ljust(255) + b"\n" + OUTPUT)
    assert read_header(path) == ShardHeader(len(OUTPUT), 0, 2, 0, 1, 1)
