"""Identifiers."""

from __future__ import annotations

import time

import pytest

from shared.ids import derived_id, is_id, new_id


@pytest.mark.parametrize("prefix", ["batch_", "file-", "chatcmpl-", "key_"])
def test_a_new_id_is_an_id_of_its_kind(prefix: str) -> None:
    """With 24 digits, and of no other kind."""
    found = new_id(prefix)
    assert is_id(found, prefix)
    assert len(found) == len(prefix) + 24
    assert not is_id(found, "other_")


def test_ids_are_unique_and_sort_by_age() -> None:
    """Milliseconds first, then chance."""
    first = new_id("batch_")
    time.sleep(0.005)
    later = {new_id("batch_") for _ in range(1000)}
    assert len(later) == 1000
    assert first < min(later)


def test_a_derived_id_follows_from_its_parts() -> None:
    """The same ones give the same id, and where parts begin matters."""
    assert derived_id("file-", "a", "b") == derived_id("file-", "a", "b")
    assert is_id(derived_id("file-", "a", "b"), "file-")
    others = {
        derived_id("file-", *parts) for parts in (("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"))
    }
    assert len(others) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file-",
        "file-a/b",
        "file-..",
        "file-a.b",
        "file-a\n",
        "file-ä",
        "file-" + "a" * 65,
        "xfile-a",
    ],
)
def test_what_could_leave_its_folder_is_no_id(text: str) -> None:
    """Ids become names of folders."""
    assert not is_id(text, "file-")
