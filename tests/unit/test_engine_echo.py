"""The echo engine: what it promises to the tests that lean on it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    EngineSetupFailed,
    InvalidValue,
)
from workers.inference.engines.base import (
    Completion,
    EngineSpec,
    Image,
    Prompt,
    Sampling,
    Turn,
    collect,
    complete_each,
)
from workers.inference.engines.echo import EchoEngine


def engine(session_len: int = 8192, **options: Any) -> EchoEngine:
    """An echo engine with these options."""
    return EchoEngine(EngineSpec("m", session_len=session_len, options=options))


def ask(text: str, images: int = 0, **sampling: Any) -> Prompt:
    """A prompt of one user turn."""
    return Prompt(1, [Turn("user", [text])], Sampling(**sampling), [Image(b"")] * images)


def answer(made: EchoEngine, prompt: Prompt) -> Completion:
    """The answer, through ``generate``."""
    return asyncio.run(collect(made, prompt))


def whole(made: EchoEngine, prompt: Prompt) -> Any:
    """The answer, through ``complete``."""

    async def first() -> Any:
        return await anext(result async for _, result in made.complete([prompt]))

    return asyncio.run(first())


def test_it_repeats_the_last_user_text() -> None:
    """Words are tokens, all turns count, white space is kept."""
    turns = [
        Turn("system", ["be brief"]),
        Turn("user", ["first"]),
        Turn("assistant", ["yes"]),
        Turn("user", ["and  now\n", "this"]),
    ]
    assert answer(engine(), Prompt(1, turns, Sampling())) == Completion(
        "and  now\nthis", "stop", prompt_tokens=7, completion_tokens=3
    )


def test_images_count_as_tokens() -> None:
    """256 each, or as the option says."""
    assert answer(engine(), ask("look", images=2)).prompt_tokens == 513
    assert answer(engine(image_tokens=10), ask("look", images=2)).prompt_tokens == 21


def test_a_prompt_beyond_the_session_is_refused() -> None:
    """One word too long; one shorter still has room for one token."""
    with pytest.raises(ContextLengthExceeded):
        answer(engine(session_len=5), ask("a b c d e"))
    assert answer(engine(session_len=5), ask("a b c d")).completion_tokens == 1


@given(
    st.text(" abc\n", max_size=30),
    st.integers(1, 8),
    st.lists(st.text("abc ", min_size=1, max_size=3), max_size=3),
)
def test_the_quick_way_answers_as_the_slow_one(text: str, limit: int, stop: list[str]) -> None:
    """``complete`` and ``generate`` agree on text, reason and counts."""
    prompt = ask(text, max_tokens=limit, stop=stop)
    assert whole(engine(), prompt) == answer(engine(), prompt)


def test_an_empty_stop_string_fails_its_prompt_only() -> None:
    """In both ways of asking."""
    with pytest.raises(InvalidValue):
        answer(engine(), ask("a", stop=[""]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dely_s": 1}, "dely_s"),
        ({"delay_s": "1"}, "delay_s"),
        ({"delay_s": -1}, "delay_s"),
        ({"faults": 1}, "faults"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    """The message names the option."""
    with pytest.raises(ConfigurationError, match=says):
        engine(**options)


def test_setup_fails_when_told_to() -> None:
    """With what to do next."""
    with pytest.raises(EngineSetupFailed, match="fail_setup"):
        asyncio.run(engine(fail_setup=True).setup())


def test_faults_are_plain_text_unless_enabled() -> None:
    """A user's prompt cannot kill an engine by accident."""
    assert answer(engine(), ask("[[echo:kill]]")).text == "[[echo:kill]]"
    assert whole(engine(), ask("[[echo:kill]]")).text == "[[echo:kill]]"


def test_an_unknown_fault_is_an_error() -> None:
    """A typing mistake in a test does not pass silently."""
    with pytest.raises(Exception, match="no fault 'kil'"):
        answer(engine(faults=True), ask("[[echo:kil]]"))


def test_delays_are_waited_for() -> None:
    """Per request and per token, in both ways of asking."""
    for way in (answer, whole):
        begin_s = time.monotonic()
        way(engine(delay_s=0.05, token_delay_s=0.02), ask("one two three"))
        assert time.monotonic() - begin_s >= 0.11


def test_complete_each_turns_every_exception_into_its_prompts_answer() -> None:
    """A bug on one prompt is not its neighbours' failure."""

    async def scenario() -> dict[int, Any]:
        prompts = [
            Prompt(i, [Turn("user", [text])], Sampling())
            for i, text in enumerate(["fine", "[[echo:bug]]", "fine too"])
        ]
        return {i: a async for i, a in complete_each(engine(faults=True), prompts)}

    answers = asyncio.run(scenario())
    assert answers[0].text == "fine"
    assert answers[1].code == "engine_error"
    assert "RuntimeError" in answers[1].message
    assert answers[2].text == "fine too"


@pytest.mark.parametrize(
    ("name", "starts"),
    [("blank", ""), ("loop", "and so on and so on"), ("refuse", "I'm sorry"), ("chinese", "图")],
)
def test_it_answers_badly_on_request(name: str, starts: str) -> None:
    """Always, or only below a temperature; in a stream as in one piece."""
    made = engine(faults=True)
    always = ask(f"[[echo:{name}]] a red circle")
    assert answer(made, always) == whole(made, always)
    assert answer(made, always).text.startswith(starts)
    assert "red circle" not in answer(made, always).text
    sometimes = f"[[echo:{name}=0.5]] a red circle"
    assert answer(made, ask(sometimes, temperature=0.4)).text == answer(made, always).text
    assert answer(made, ask(sometimes, temperature=0.5)).text == sometimes


def test_it_answers_well_where_faults_are_off() -> None:
    """The request for one is then a text like any other."""
    assert answer(engine(), ask("[[echo:blank]]")).text == "[[echo:blank]]"
