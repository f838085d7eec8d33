"""The notes that tell which item kills workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import StorageFailed
from workers.inference.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the notes of one chunk are."""
    return tmp_path / "attempts" / "7.json"


def die_at(path: Path, line: int) -> None:
    """A worker prepares lines up to one that kills it."""
    journal = Journal(path)
    for number in range(1, line + 1):
        if not journal.given_up(number):
            journal.enter(number)


def test_a_line_is_given_up_after_killing_twice(path: Path) -> None:
    """Once may be chance."""
    die_at(path, 5)
    assert not Journal(path).given_up(5)
    die_at(path, 5)
    journal = Journal(path)
    assert [number for number in range(1, 10) if journal.given_up(number)] == [5]


def test_reading_the_notes_again_adds_no_blame(path: Path) -> None:
    """A worker that dies before its first item blames nobody twice."""
    die_at(path, 5)
    for _ in range(5):
        assert not Journal(path).given_up(5)


def test_several_lines_may_be_to_blame(path: Path) -> None:
    """Each has a count of its own."""
    for line in (3, 8, 3, 8):
        die_at(path, line)
    journal = Journal(path)
    assert journal.given_up(3)
    assert journal.given_up(8)
    assert not journal.given_up(4)


def test_when_all_is_prepared_nobody_is_to_blame(path: Path) -> None:
    """Dying after that has other reasons."""
    for _ in range(3):
        journal = Journal(path)
        journal.enter(5)
        journal.enter(None)
    assert not Journal(path).given_up(5)


def test_notes_are_replaced_whole(path: Path) -> None:
    """A kill between two writes leaves one or the other."""
    die_at(path, 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["7.json"]


def test_damaged_notes_are_said_to_be(path: Path) -> None:
    """Not taken for none."""
    path.parent.mkdir()
    path.write_text("{half")
    with pytest.raises(StorageFailed):
        Journal(path)
