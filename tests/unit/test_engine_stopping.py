"""Stop strings, against a definition that sees the whole text at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidValue
from workers.inference.engines.stopping import StopStrings

# Two letters make overlaps, partial matches and nested stop strings likely.
TEXTS = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def whole(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: cut before the stop string that is complete first, the longest of a tie."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    """Cut a text at these places."""
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=10))
def test_the_result_does_not_depend_on_how_the_text_was_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """Pieces in, the same text out as from the whole."""
    stopping = StopStrings(stops)
    shown, stopped = "", False
    for piece in pieces(text, cuts):
        emit, stopped = stopping.push(piece)
        shown += emit
        if stopped:
            break
    if not stopped:
        shown += stopping.flush()
    assert (shown, stopped) == whole(text, stops)


@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str]) -> None:
    """What is held back is always the beginning of a stop string."""
    stopping = StopStrings(stops)
    shown = ""
    for letter in text:
        emit, stopped = stopping.push(letter)
        shown += emit
        if stopped:
            return
    held = stopping.flush()
    assert shown + held == text
    assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_comes_after_a_stop() -> None:
    """Text pushed later is dropped."""
    stopping = StopStrings(["."])
    assert stopping.push("one. two") == ("one", True)
    assert stopping.push("three") == ("", True)
    assert stopping.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    """It would end every answer before it begins."""
    with pytest.raises(InvalidValue):
        StopStrings(["ok", ""])
