"""What a caption job is asked: templates, names as text, places as records."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.captions import (
    CaptionSource,
    Entry,
    ImagePlace,
    Template,
    decode_entry,
    escape_name,
    request_of,
    unescape_name,
    unique_labels,
)
from shared.chat import parse_chat_request
from shared.errors import EntryRefused, InvalidValue, TextMissing
from workers.inference.seen_names import SeenNames

FILE_NAMES = st.binary(min_size=1).filter(lambda raw: b"\0" not in raw and b"/" not in raw)


@given(FILE_NAMES)
def test_any_file_name_is_text_and_comes_back(raw: bytes) -> None:
    """Whatever its bytes; the text is valid in JSON."""
    name = os.fsdecode(raw)
    text = escape_name(name)
    assert unescape_name(text) == name
    entry = Entry(text)
    assert decode_entry(msgspec.json.encode(entry)) == entry


@given(FILE_NAMES, FILE_NAMES)
def test_different_names_stay_different(one: bytes, other: bytes) -> None:
    """Also one that looks like the other's escape."""
    texts = escape_name(os.fsdecode(one)), escape_name(os.fsdecode(other))
    assert (texts[0] == texts[1]) == (one == other)
    literal = os.fsdecode(escape_name(os.fsdecode(one)).encode())
    if literal != os.fsdecode(one):
        assert escape_name(literal) != texts[0]


def test_a_template_is_filled_with_texts() -> None:
    """Doubled braces stand for braces; a text's own braces mean nothing."""
    template = Template('{a} {{"x": 1}} {json.b}{a}')
    assert template.columns == ("a", "json.b")
    assert template.fill({"a": "{json.b}", "json.b": "two"}) == '{json.b} {"x": 1} two{json.b}'


@pytest.mark.parametrize("text", ["{", "}", "a } b", "{}", "{a{b}}", "{" + "x" * 300 + "}"])
def test_a_broken_template_is_refused(text: str) -> None:
    """By the place of the brace."""
    with pytest.raises(InvalidValue, match="at character") as refused:
        Template(text)
    assert refused.value.param == "template"


def test_a_text_that_is_not_there_is_named() -> None:
    """The first of them."""
    with pytest.raises(TextMissing, match=r"\{b\}"):
        Template("{a} {b} {c}").fill({"a": "1"})


def test_a_text_that_is_too_long_is_refused() -> None:
    """Whole prompts of it would fit into no session."""
    with pytest.raises(TextMissing, match="at most 100,000"):
        Template("{a}").fill({"a": "x" * 100_001})


def test_a_prompt_is_taken_as_it_is() -> None:
    """Braces and all."""
    source = CaptionSource(images=[ImagePlace(path="/x")], model="m", prompt='{"a": {}} }')
    assert source.columns == ()
    assert source.asked.fill({}) == source.prompt


def test_the_request_is_one_that_could_have_been_sent() -> None:
    """With its parameters, system message and image."""
    source = CaptionSource(
        images=[],
        model="m",
        prompt="p",
        system="s",
        detail="low",
        temperature=0.5,
        stop="x",
        seed=7,
    )
    request = request_of(source, "p")
    assert parse_chat_request(msgspec.json.encode(request)) == request
    assert request.image_count == 1
    assert (request.temperature, request.stop_strings, request.seed) == (0.5, ["x"], 7)
    assert [message.role for message in request.messages] == ["system", "user"]


def test_an_entry_keeps_its_refusal() -> None:
    """As the error it was."""
    refused = EntryRefused("a link")
    line = msgspec.json.encode(Entry("x", refused=(refused.code, refused.message)))
    error = decode_entry(line).error()
    assert isinstance(error, EntryRefused)
    assert error.message == "a link"


def test_labels_become_unique() -> None:
    """Also those that look like a number was given already."""
    assert unique_labels(["a", "a", "a-2", "a"]) == ["a", "a-2", "a-2-2", "a-3"]


@given(st.lists(st.sampled_from(["a", "b", "a#1", "a#2", "b#3", "a#2#4"]), max_size=12))
def test_names_become_unique(names: list[str]) -> None:
    """Whatever they are; those that were new stay as they are."""
    with tempfile.TemporaryDirectory() as folder, SeenNames(Path(folder)) as seen:
        made = [seen.unique(name, number) for number, name in enumerate(names, 1)]
    assert len(set(made)) == len(names)
    assert all(
        one == other or one.startswith(f"{other}#") for one, other in zip(made, names, strict=True)
    )


def test_many_names_are_remembered() -> None:
    """The table grows; nothing is forgotten, nothing invented."""
    with tempfile.TemporaryDirectory() as folder, SeenNames(Path(folder)) as seen:
        assert all(seen.add(f"name {number}") for number in range(80_000))
        assert not any(seen.add(f"name {number}") for number in range(0, 80_000, 97))
        assert list(Path(folder).iterdir()) == []
