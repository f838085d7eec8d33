"""Chat through everything: the SDK, Flask, Redis, Celery, a consumer and an engine process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.running_node import RunningNode

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def test_the_streamed_pieces_are_the_plain_answer(sdk: openai.OpenAI) -> None:
    """One engine, two ways to have its answer; both count the same tokens."""
    plain = sdk.chat.completions.create(model="echo", messages=HELLO, seed=1)
    chunks = list(
        sdk.chat.completions.create(
            model="echo",
            messages=HELLO,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert "hello" in text
    assert chunks[-1].usage == plain.usage
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason


def test_max_tokens_ends_an_answer_by_length(sdk: openai.OpenAI) -> None:
    """The parameter reaches the engine, and its reason comes back."""
    answer = sdk.chat.completions.create(model="echo", messages=HELLO, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_an_image_that_is_none_is_a_bad_request_that_names_it(sdk: openai.OpenAI) -> None:
    """The consumer's verdict reaches the client as a typed error."""
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.chat.completions.create(
                model="echo",
                messages=[{"role": "user", "content": [broken]}],  # type: ignore[misc,list-item]
                stream=stream,
            )
        assert (refused.value.code or "").startswith("image_")
        assert refused.value.request_id


def test_200_streams_at_once_all_end_well(sdk: openai.OpenAI) -> None:
    """On one API process, each with the whole answer."""

    def one(number: int) -> str:
        stream = sdk.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": f"number {number}."}], stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(max_workers=200) as pool:
        answers = list(pool.map(one, range(200)))
    wrong = [number for number, text in enumerate(answers) if f"number {number}." not in text]
    assert wrong == []


def test_a_cancelled_stream_leaves_the_node_free(sdk: openai.OpenAI, node: RunningNode) -> None:
    """After many clients have gone away, no request stays open."""
    for _ in range(20):
        stream = sdk.chat.completions.create(model="echo", messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 15
    while node.stores.redis.zcard("vlmq:chats"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
