"""From a request to what an engine is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shared.chat import parse_chat_request
from shared.errors import ImageNotFound, ImageTooLarge, InvalidValue
from shared.models import ModelDefaults
from shared.settings import ImageSettings
from workers.inference.engines.base import Image, Prompt
from workers.inference.prompts import build_prompt

LIMITS = ImageSettings(max_per_request=2, max_request_bytes=1000)
DEFAULTS = ModelDefaults(max_tokens=10, temperature=0.5, top_p=0.6, top_k=7)


def read(url: str, detail: str) -> Image:
    """An image for each URL but one."""
    if url == "missing":
        raise ImageNotFound
    return Image(url.encode(), "file", 1, 2, detail, len(url))  # type: ignore[arg-type]


def build(
    messages: list[dict[str, Any]], defaults: ModelDefaults = DEFAULTS, **fields: Any
) -> Prompt:
    """The prompt of a request."""
    body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    return build_prompt(5, parse_chat_request(body), defaults, read, limits=LIMITS)


def part(url: str, **fields: str) -> dict[str, Any]:
    """An image part."""
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def user(*parts: Any) -> dict[str, Any]:
    """A user message of parts."""
    return {"role": "user", "content": list(parts)}


def test_what_is_not_said_is_the_models_default() -> None:
    """And zero is something said."""
    sampling = build([user({"type": "text", "text": "x"})]).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        10,
        0.5,
        0.6,
        7,
    )
    said = build([user({"type": "text", "text": "x"})], temperature=0, top_k=0, seed=0).sampling
    assert (said.temperature, said.top_k, said.seed) == (0, 0, 0)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_models_system_message_stands_where_a_request_has_none(role: str) -> None:
    """One that was tuned under it answers best under it; whoever says another gets that."""
    tuned = ModelDefaults(system="You know dishes.")
    asked = {"role": "user", "content": "x"}
    assert [turn.role for turn in build([asked]).turns] == ["user"]
    turns = build([asked], tuned).turns
    assert [(turn.role, turn.parts) for turn in turns] == [
        ("system", ["You know dishes."]),
        ("user", ["x"]),
    ]
    turns = build([{"role": role, "content": "Be brief."}, asked], tuned).turns
    assert [turn.parts for turn in turns] == [["Be brief."], ["x"]]


def test_the_new_name_of_the_token_limit_wins() -> None:
    """Both may be sent by careful clients."""
    messages = [{"role": "user", "content": "x"}]
    assert build(messages, max_tokens=3).sampling.max_tokens == 3
    assert build(messages, max_tokens=3, max_completion_tokens=4).sampling.max_tokens == 4


def test_images_are_numbered_across_messages() -> None:
    """In their places between the texts, each read once with its detail."""
    prompt = build(
        [
            {"role": "developer", "content": "rules"},
            user(part("one", detail="low"), {"type": "text", "text": "and"}),
            {"role": "assistant", "content": "yes"},
            user({"type": "text", "text": "this"}, part("two")),
        ]
    )
    assert [(turn.role, turn.parts) for turn in prompt.turns] == [
        ("system", ["rules"]),
        ("user", [0, "and"]),
        ("assistant", ["yes"]),
        ("user", ["this", 1]),
    ]
    assert [(image.data, image.detail) for image in prompt.images] == [
        (b"one", "low"),
        (b"two", "auto"),
    ]
    assert prompt.id == 5


def test_an_image_that_cannot_be_had_is_named() -> None:
    """By its place in the request."""
    with pytest.raises(ImageNotFound) as refused:
        build([user({"type": "text", "text": "x"}), user(part("one"), part("missing"))])
    assert refused.value.param == "messages[1].content[1].image_url.url"


def test_too_many_images_are_refused() -> None:
    """Counted over the whole request."""
    with pytest.raises(InvalidValue) as refused:
        build([user(part("a"), part("b")), user(part("c"))])
    assert refused.value.param == "messages"


def test_images_that_are_too_large_together_are_refused_at_the_one_too_many() -> None:
    """Each alone would do."""
    half = "x" * 600
    with pytest.raises(ImageTooLarge) as refused:
        build([user(part(half), part(half))])
    assert refused.value.param == "messages[0].content[1].image_url.url"
