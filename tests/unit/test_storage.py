"""Files that are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from shared.errors import StorageFailed, StorageFull
from shared.storage import (
    Layout,
    atomic_file,
    read_json,
    remove_tree,
    require_space,
    storage_errors,
    write_bytes,
    write_json,
)


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_is_there_whole(tmp_path: Path) -> None:
    """For this user only, with nothing beside it."""
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 2]})
    assert read_json(path) == {"x": [1, 2]}
    assert names(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_while_it_is_written_the_old_one_is_seen(tmp_path: Path) -> None:
    """A reader never meets half a file."""
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with atomic_file(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_write_that_failed_leaves_the_old_one(tmp_path: Path) -> None:
    """And no remains."""
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fail() -> None:
        with atomic_file(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_its_own_error(tmp_path: Path, number: int) -> None:
    """One may go on when there is room."""
    with pytest.raises(StorageFull) as full, storage_errors(tmp_path / "content"):
        raise OSError(number, "full")
    assert full.value.retryable
    assert "content" in full.value.message


def test_other_failures_name_the_place(tmp_path: Path) -> None:
    """So that an operator knows which disk."""
    with pytest.raises(StorageFailed, match="nowhere"):
        write_bytes(tmp_path / "nowhere" / "a", b"")


def test_what_is_not_there_reads_as_none(tmp_path: Path) -> None:
    """Damage does not."""
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_bytes(b'{"half": ')
    with pytest.raises(StorageFailed, match="damaged"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(StorageFailed):
        read_json(tmp_path)


def test_a_removed_folder_leaves_nothing(tmp_path: Path) -> None:
    """Twice is fine."""
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").touch()
    remove_tree(folder)
    remove_tree(folder)
    assert names(tmp_path) == []


def test_room_is_asked_for_before_it_is_needed(tmp_path: Path) -> None:
    """Where there is none, the message says how much is missing."""
    require_space(tmp_path, 1)
    with pytest.raises(StorageFull, match="MiB are needed"):
        require_space(tmp_path, 1 << 60)


def test_the_layout_is_private(tmp_path: Path) -> None:
    """It may be made again."""
    layout = Layout(tmp_path / "data")
    layout.create()
    layout.create()
    folders = [layout.root, layout.files, layout.batches, layout.models]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert layout.file_dir("file-a").parent == layout.files
