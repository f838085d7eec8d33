"""Streaming text: whole characters, and never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.inference.internvl.text import TextStream


def _bytes_to_text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def _streamed(data: bytes, stops: Sequence[str] = ()) -> list[str]:
    stream = TextStream(_bytes_to_text, stops)
    pieces = []
    for token in data:
        pieces.append(stream.push(token))
        if stream.has_stopped():
            break
    return [*pieces, stream.finish()]


def test_a_character_of_many_bytes_comes_in_one_piece() -> None:
    """Nothing is shown until its last byte is there."""
    pieces = _streamed("a🍜é".encode())
    assert [piece for piece in pieces if piece] == ["a", "🍜", "é"]


def test_bytes_that_are_no_text_still_show() -> None:
    """A broken sequence ends as a replacement mark rather than holding the answer back."""
    assert "".join(_streamed(b"ab\xf0\x9f")) == "ab\ufffd"
    assert "".join(_streamed(b"\xff" * 300 + b"z")).endswith("z")


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_the_pieces_make_the_text(text: str) -> None:
    """However long the answer, nothing is lost, doubled or split."""
    pieces = _streamed(text.encode())
    assert "".join(pieces) == text


@given(st.text("ab<c", max_size=60), st.lists(st.text("ab<c", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200, deadline=None)
def test_nothing_of_the_first_stop_string_to_complete_is_shown(text: str, stops: list[str]) -> None:
    """The answer ends where the first stop string to be complete began."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)]
    assert "".join(_streamed(text.encode(), stops)) == expected


def test_text_that_only_looked_like_a_stop_string_is_shown_at_last() -> None:
    """What was held back comes when it can no longer become one, or at the end."""
    pieces = _streamed(b"x<en<end", ["<end>"])
    assert "".join(pieces) == "x<en<end"
    assert pieces[-1] == "<end"
