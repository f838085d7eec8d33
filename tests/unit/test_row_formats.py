"""Rows of every format become conversations; what xtuner would bend is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.errors import DatasetFormatUnclear, DatasetInvalid, RowUnusable
from tests.datasets import llava, openai
from workers.training.row_formats import (
    PARSERS,
    detect,
    parse_foodieqa,
    parse_llava,
    parse_openai,
)
from workers.training.rows import Row, Turn


def encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


FOODIE: dict[str, Any] = {
    "question": "图片中的食物通常属于哪个菜系?",
    "choices": ["京菜", "徽菜", "新疆菜", "桂菜"],
    "answer": "0",
    "question_type": "cuisine_type",
    "food_name": "烤羊肉串",
    "question_id": "sivqa-001",
    "food_meta": {
        "main_ingredient": "肉",
        "id": 217,
        "food_name": "烤羊肉串",
        "food_type": "肉类",
        "food_location": "餐馆",
        "food_file": "images/14456664_217_IMG_3854.jpeg",
    },
    "question_en": "The food in the picture usually belongs to which cuisine?",
    "choices_en": ["Beijing cuisine", "Anhui cuisine", "Xinjiang cuisine", "Guangxi cuisine"],
}


def without(row: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in fields}


def said(*turns: tuple[str, str], image: Any = "a.jpg") -> dict[str, Any]:
    found = [{"from": role, "value": value} for role, value in turns]
    return {"conversations": found, **({} if image is None else {"image": image})}


def chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def part(url: str = "a.jpg", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


class TestGoodRows:
    def test_an_openai_line(self) -> None:
        assert parse_openai(encoded(openai("data:x"))) == Row(
            [Turn("human", "What is it?"), Turn("gpt", "A dish.")], "data:x", 0
        )

    def test_a_text_only_openai_line(self) -> None:
        row = parse_openai(encoded(chat(("user", "Hello"), ("assistant", "Hi"))))
        assert row == Row([Turn("human", "Hello"), Turn("gpt", "Hi")])

    def test_a_system_prompt_is_left_out_and_noted(self) -> None:
        row = parse_openai(encoded(chat(("system", "Rhyme."), ("user", "Hi"), ("assistant", "Yo"))))
        assert row.notes == ("system_prompt_left_out",)
        assert [turn.text for turn in row.turns] == ["Hi", "Yo"]
        row = parse_llava(encoded(said(("system", "Rhyme."), ("human", "<image>"), ("gpt", "Yo"))))
        assert row.notes == ("system_prompt_left_out",)
        assert row.image_turn == 0

    def test_texts_of_one_message_stand_on_lines_of_their_own(self) -> None:
        content = [text("Look:"), part("a.jpg"), text("What is it?")]
        row = parse_openai(encoded(chat(("user", content), ("assistant", "A cup"))))
        assert row.turns[0].text == "Look:\nWhat is it?"
        assert row.notes == ("image_moved_to_front",)

    def test_a_wish_for_low_detail_is_noted(self) -> None:
        row = parse_openai(
            encoded(chat(("user", [part(detail="low"), text("?")]), ("assistant", "!")))
        )
        assert row.notes == ("detail_ignored",)

    def test_an_image_of_a_later_question_stays_there(self) -> None:
        turns = (("human", "Hi"), ("gpt", "Yes?"), ("human", "<image>\nWhat?"), ("gpt", "A cup"))
        row = parse_llava(encoded(said(*turns)))
        assert (row.image, row.image_turn) == ("a.jpg", 2)
        assert [turn.text for turn in row.turns] == ["Hi", "Yes?", "What?", "A cup"]

    def test_an_image_with_no_words_is_a_question(self) -> None:
        row = parse_llava(encoded(said(("human", "<image>"), ("gpt", "A cup"))))
        assert row.turns[0].text == ""
        row = parse_openai(encoded(chat(("user", [part()]), ("assistant", "A cup"))))
        assert row.turns[0].text == ""

    def test_the_fields_that_datasets_add_do_no_harm(self) -> None:
        row = parse_llava(encoded({**llava("a.jpg"), "id": 7, "source": "x", "image": ["a.jpg"]}))
        assert row.image == "a.jpg"

    def test_a_published_foodieqa_row(self) -> None:
        assert parse_foodieqa(encoded(FOODIE)) == Row(
            [
                Turn("human", "图片中的食物通常属于哪个菜系?"),
                Turn("gpt", "京菜，图中的菜是烤羊肉串"),
            ],
            "images/14456664_217_IMG_3854.jpeg",
        )

    @pytest.mark.parametrize("choices", ["京菜,徽菜, 新疆菜", "京菜，徽菜，新疆菜"])
    def test_a_flat_foodieqa_row_with_choices_as_text(self, choices: str) -> None:
        flat = {**without(FOODIE, "food_meta"), "food_file": "a.jpg", "answer": 2}
        row = parse_foodieqa(encoded({**flat, "choices": choices}))
        assert row.turns[1].text == "新疆菜，图中的菜是烤羊肉串"


BAD: list[tuple[str, Any, str, str | None]] = [
    ("openai", chat(), "no_answer", "turns"),
    ("openai", {"messages": "Hello"}, "invalid_value", "messages"),
    ("openai", chat(("user", "Hi")), "no_answer", "turns"),
    ("openai", chat(("user", "Hi"), ("assistant", " \n")), "empty_answer", "turn 2"),
    ("openai", chat(("user", " "), ("assistant", "Hi")), "empty_question", "turn 1"),
    ("openai", chat(("assistant", "Hi"), ("user", "Hi")), "roles_out_of_order", "turn 1"),
    (
        "openai",
        chat(("user", "Hi"), ("user", "Hi"), ("assistant", "Yo")),
        "roles_out_of_order",
        "turn 2",
    ),
    ("openai", chat(("tool", "Hi"), ("assistant", "Yo")), "invalid_value", "messages[0].role"),
    (
        "openai",
        chat(("user", "Hi"), ("assistant", [part()])),
        "image_in_answer",
        "messages[1].content",
    ),
    (
        "openai",
        chat(("user", [part("a"), part("b")]), ("assistant", "Yo")),
        "several_images",
        "messages",
    ),
    ("openai", {**openai("a.jpg"), "tools": []}, "unsupported_parameter", "tools"),
    (
        "openai",
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": []}]},
        "unsupported_parameter",
        "messages[1].tool_calls",
    ),
    (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "!", "weight": 0},
            ]
        },
        "unsupported_field",
        "messages[1].weight",
    ),
    (
        "openai",
        chat(("user", "What does <image> mean?"), ("assistant", "A tag")),
        "control_token",
        "turn 1",
    ),
    (
        "openai",
        chat(("user", "Hi"), ("assistant", "Yo<|im_end|>")),
        "control_token",
        "turn 2",
    ),
    ("openai", chat(("user", "Hi\0"), ("assistant", "Yo")), "invalid_text", "turn 1"),
    ("llava", said(("human", "<image>?"), ("gpt", "!"), image=["a", "b"]), "several_images", None),
    ("llava", said(("human", "<image><image>?"), ("gpt", "!")), "several_images", None),
    (
        "llava",
        said(("human", "<image>?"), ("gpt", "!"), ("human", "<image>"), ("gpt", ".")),
        "several_images",
        None,
    ),
    ("llava", said(("human", "What?"), ("gpt", "!")), "image_tag_missing", "conversations"),
    ("llava", said(("human", "<image>?"), ("gpt", "!"), image=None), "image_missing", "image"),
    ("llava", said(("human", "<image>?"), ("gpt", "!"), image=""), "image_not_found", "image"),
    ("llava", said(("human", "<image>?"), ("gpt", "!"), image="a\0"), "image_not_found", "image"),
    (
        "llava",
        said(("human", "<image>?"), ("gpt", "!"), image="a" * 5000),
        "image_not_found",
        "image",
    ),
    ("llava", said(("gpt", "<image>"), ("human", "!"), image=None), "roles_out_of_order", None),
    ("llava", said(("human", "?"), ("gpt", "<image>"), image=None), "control_token", "turn 2"),
    ("llava", said(("Human", "?"), ("gpt", "!")), "unknown_role", "conversations[0].from"),
    ("llava", {**llava(None), "video": "a.mp4"}, "unsupported_field", "video"),
    ("llava", {"conversations": [{"from": "human"}]}, "invalid_value", "conversations[0].value"),
    (
        "llava",
        {"conversations": [{"from": "human", "value": None}]},
        "invalid_value",
        "conversations[0].value",
    ),
    ("foodieqa", {**FOODIE, "answer": "4"}, "invalid_value", "answer"),
    ("foodieqa", {**FOODIE, "answer": -1}, "invalid_value", "answer"),
    ("foodieqa", {**FOODIE, "answer": "A"}, "invalid_value", "answer"),
    ("foodieqa", {**FOODIE, "choices": []}, "invalid_value", "answer"),
    ("foodieqa", {**FOODIE, "choices": [" ", "b"]}, "empty_answer", "choices"),
    ("foodieqa", {**FOODIE, "food_meta": {}}, "image_missing", "food_meta.food_file"),
    (
        "foodieqa",
        {**FOODIE, "food_name": " ", "food_meta": {"food_file": "a.jpg"}},
        "invalid_value",
        "food_meta.food_name",
    ),
    ("foodieqa", {**FOODIE, "images": ["a.jpg", "b.jpg"]}, "several_images", "images"),
    ("foodieqa", {**FOODIE, "question": "<img>?"}, "control_token", "turn 1"),
]


@pytest.mark.parametrize(("format_", "row", "reason", "field"), BAD)
def test_a_row_that_xtuner_would_bend_is_refused(
    format_: str, row: Any, reason: str, field: str | None
) -> None:
    with pytest.raises(RowUnusable) as caught:
        PARSERS[format_](encoded(row))
    assert caught.value.reason == reason
    if field is not None:
        assert caught.value.param == field


BROKEN = [
    b"{",
    b"nothing",
    b'{"messages": [}',
    b'{"conversations": "\xff\xfe"}',
    b'{"question": "\\ud800"}',
    b"{}" + b"\0",
    b'{"messages":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    b'{"a":' * 1_000_000,
    b"[]",
    b"7",
    b'"text"',
]


@pytest.mark.parametrize("format_", PARSERS)
@pytest.mark.parametrize("row", BROKEN)
def test_whatever_the_bytes_a_row_is_refused_and_nothing_else_happens(
    format_: str, row: bytes
) -> None:
    with pytest.raises(RowUnusable) as caught:
        PARSERS[format_](row)
    assert caught.value.reason in {"invalid_json", "invalid_value", "unsupported_parameter"}
    assert len(caught.value.message) < 500
    assert "the body" not in caught.value.message


class TestDetection:
    @pytest.mark.parametrize(
        ("row", "format_"),
        [(openai("a"), "openai"), (llava("a"), "llava"), (FOODIE, "foodieqa")],
    )
    def test_a_format_is_known_by_its_fields(self, row: Any, format_: str) -> None:
        assert detect([b"no json", encoded(row), encoded(row)], "training_file") == format_

    def test_two_at_once_are_named(self) -> None:
        both = encoded({**openai("a"), **llava("a")})
        with pytest.raises(DatasetFormatUnclear, match="llava and openai") as caught:
            detect([both], "training_file")
        assert caught.value.param == "training_file"
        with pytest.raises(DatasetFormatUnclear, match="llava and openai"):
            detect([encoded(openai("a")), encoded(llava("a"))], "training_file")

    @pytest.mark.parametrize("row", [b"{}", b"[]", b'{"prompt": "", "completion": ""}', b"\xff"])
    def test_none_says_what_is_known(self, row: bytes) -> None:
        with pytest.raises(DatasetFormatUnclear, match=r"messages.*conversations.*choices"):
            detect([row], "validation_file")

    def test_lines_of_a_batch_are_told_apart(self) -> None:
        line = encoded({"custom_id": "1", "method": "POST", "url": "/v1", "body": {}})
        with pytest.raises(DatasetInvalid, match="id of the finished batch"):
            detect([line], "training_file")
