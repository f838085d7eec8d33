"""What every engine does, whatever model is behind it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from PIL import Image as Pillow

from shared.errors import ContextLengthExceeded, ImagesCutOtherwise, RequestAborted, VlmqError
from shared.settings import ImageSettings
from tests.contract.conftest import SESSION_LEN, Kind
from tests.contract.hosts import ask
from workers.inference.engines.base import (
    Completion,
    Delta,
    Engine,
    Image,
    Prompt,
    Sampling,
    Tiling,
    Turn,
    collect,
    let_go,
)
from workers.inference.images import prepare

pytestmark = pytest.mark.timeout(120)

T = TypeVar("T")
SENTENCE = "a red circle left of a blue square on a plain white ground with a thin frame"


@pytest.fixture
def run(runner: asyncio.Runner) -> Any:
    """Run a coroutine on the engine's loop."""

    def _run(work: Coroutine[Any, Any, T]) -> T:
        return runner.run(work)

    return _run


def greedy(text: str, prompt_id: int = 1, **sampling: Any) -> Prompt:
    """A prompt with a deterministic answer of a few tokens."""
    settings = {"temperature": 0.0, "max_tokens": 12, "min_new_tokens": 12, **sampling}
    return ask(text, prompt_id, **settings)


def lasting(kind: Kind, prompt_id: int = 1) -> Prompt:
    """A prompt whose answer is not complete before the test steps in."""
    return greedy(kind.lasting, prompt_id, max_tokens=400, min_new_tokens=400)


async def deltas_of(engine: Engine, prompt: Prompt) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt)]


async def completed(engine: Engine, prompts: list[Prompt]) -> list[tuple[int, Any]]:
    return [answer async for answer in engine.complete(prompts)]


def test_an_answer_is_deltas_and_one_last_delta_with_reason_and_counts(
    engine: Engine, run: Any
) -> None:
    """Only the last delta says why the answer ended and what it cost."""
    deltas = run(deltas_of(engine, greedy(SENTENCE)))
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert deltas[-1].prompt_tokens > 0
    assert deltas[-1].completion_tokens == 12
    assert len(deltas) > 2, "the answer came in one piece"


def test_one_setup_serves_many_requests(engine: Engine, run: Any) -> None:
    """The same greedy prompt has the same answer every time."""
    answers = [run(collect(engine, greedy(SENTENCE))) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].text


def test_max_tokens_ends_the_answer_with_length(engine: Engine, run: Any) -> None:
    """Exactly as many tokens as allowed, and the reason says so."""
    answer = run(collect(engine, greedy(SENTENCE, max_tokens=5, min_new_tokens=5)))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine, run: Any) -> None:
    """The text before the stop string is whole, in deltas and in completions."""
    text = run(collect(engine, greedy(SENTENCE))).text
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    prompt = greedy(SENTENCE, stop=[stop], min_new_tokens=0)
    expected = text[: text.index(stop)]
    streamed = run(deltas_of(engine, prompt))
    assert "".join(delta.text for delta in streamed) == expected
    assert streamed[-1].finish_reason == "stop"
    [(_, whole)] = run(completed(engine, [prompt]))
    assert (whole.text, whole.finish_reason) == (expected, "stop")


def test_requests_at_the_same_time_do_not_mix(engine: Engine, run: Any) -> None:
    """Each answer equals the one its prompt gets alone."""
    prompts = [greedy(f"{SENTENCE} number {i}"[i:], i) for i in range(6)]
    alone = [run(collect(engine, prompt)) for prompt in prompts]

    async def together() -> list[Completion]:
        return await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))

    assert run(together()) == alone


def test_abort_ends_one_stream_and_leaves_the_others(engine: Engine, kind: Kind, run: Any) -> None:
    """The aborted request raises RequestAborted; its neighbour gets its whole answer."""

    async def scenario() -> tuple[Any, Completion]:
        doomed = asyncio.ensure_future(collect(engine, lasting(kind, 1)))
        neighbour = asyncio.ensure_future(collect(engine, greedy(SENTENCE, 2)))
        await asyncio.sleep(0.05)
        await engine.abort(1)
        return (await asyncio.gather(doomed, return_exceptions=True))[0], await neighbour

    outcome, neighbour = run(scenario())
    assert isinstance(outcome, RequestAborted)
    assert neighbour.completion_tokens == 12


def test_abort_within_a_group_is_answered_too(engine: Engine, kind: Kind, run: Any) -> None:
    """``complete`` still yields every id once; the aborted one as RequestAborted."""

    async def scenario() -> dict[int, Any]:
        work = asyncio.ensure_future(
            completed(engine, [lasting(kind, 1), greedy(SENTENCE, 2), greedy(SENTENCE, 3)])
        )
        await asyncio.sleep(0.05)
        await engine.abort(1)
        answers = await work
        assert len(answers) == 3
        return dict(answers)

    answers = run(scenario())
    assert isinstance(answers[1], RequestAborted)
    assert answers[2] == answers[3]


def test_abort_of_an_unknown_id_is_ignored(engine: Engine, run: Any) -> None:
    """A late abort harms nobody."""
    run(engine.abort(987))
    assert run(collect(engine, greedy(SENTENCE))).text


def test_closing_the_iterator_aborts_the_request(engine: Engine, kind: Kind, run: Any) -> None:
    """Nothing of it is left: the same id can be asked again at once."""

    async def scenario() -> Completion:
        deltas = engine.generate(lasting(kind))
        reading = asyncio.ensure_future(anext(aiter(deltas)))
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await let_go(deltas)
        return await collect(engine, greedy(SENTENCE))

    assert run(scenario()).completion_tokens == 12


def test_a_prompt_longer_than_the_session_fails_alone(engine: Engine, run: Any) -> None:
    """It gets ContextLengthExceeded, its neighbours their answers."""
    long = greedy(" ".join(["circle"] * (SESSION_LEN * 2)), 1)
    answers = dict(run(completed(engine, [long, greedy(SENTENCE, 2), greedy(SENTENCE, 3)])))
    assert isinstance(answers[1], ContextLengthExceeded)
    assert answers[2].completion_tokens == answers[3].completion_tokens == 12
    with pytest.raises(ContextLengthExceeded):
        run(collect(engine, long))


def test_bytes_that_are_no_image_fail_alone(engine: Engine, kind: Kind, run: Any) -> None:
    """An engine that reads images says so, and goes on."""
    if not kind.reads_images:
        pytest.skip("this engine does not look into images")
    turns = [Turn("user", [0, SENTENCE])]
    broken = Prompt(1, turns, Sampling(max_tokens=4), [Image(b"these bytes are no image")])
    answers = dict(run(completed(engine, [broken, greedy(SENTENCE, 2)])))
    assert isinstance(answers[1], VlmqError)
    assert answers[2].completion_tokens == 12


def test_an_image_cut_as_the_engine_says_is_the_same_image(
    engine: Engine, kind: Kind, run: Any
) -> None:
    """Consumers do the cutting; the answer is that to the file."""
    if not kind.reads_images:
        pytest.skip("this engine does not look into images")
    out = io.BytesIO()
    tiling = engine.tiling()
    assert tiling is not None
    # Several tiles, or one where a tile fills half of the suite's short session.
    size = (500, 230) if tiling.tile_px < 448 else (448, 448)
    Pillow.effect_mandelbrot(size, (-2, -1, 1, 1), 60).convert("RGB").save(out, "PNG")
    file = prepare(out.getvalue(), ImageSettings(), None)
    tiles = prepare(out.getvalue(), ImageSettings(scaling="exact"), tiling)
    assert (file.encoding, tiles.encoding) == ("file", "tiles")
    asked = [
        Prompt(i, [Turn("user", [0, SENTENCE])], Sampling(max_tokens=8, temperature=0), [image])
        for i, image in enumerate([file, tiles])
    ]
    answers = dict(run(completed(engine, asked)))
    assert answers[0] == answers[1]
    assert answers[0].prompt_tokens > 2


def test_tiles_of_another_size_are_told_apart_even_where_their_bytes_fit(
    engine: Engine, kind: Kind, run: Any
) -> None:
    """The model was replaced meanwhile: whoever asked cuts the image again."""
    if not kind.reads_images:
        pytest.skip("this engine does not look into images")
    tiling = engine.tiling()
    assert tiling is not None
    out = io.BytesIO()
    Pillow.new("RGB", (100, 100), "red").save(out, "PNG")
    halved = Tiling(tiling.tile_px // 2, 4, 4)
    four = prepare(out.getvalue(), ImageSettings(), halved)
    assert len(four.data) == tiling.tile_px**2 * 3
    cut_otherwise = Prompt(1, [Turn("user", [0, SENTENCE])], Sampling(max_tokens=4), [four])
    answers = dict(run(completed(engine, [cut_otherwise, greedy(SENTENCE, 2)])))
    assert isinstance(answers[1], ImagesCutOtherwise)
    assert answers[2].completion_tokens == 12


def test_complete_answers_every_id_once_and_as_generate_would(engine: Engine, run: Any) -> None:
    """The way for batches and the way for streams agree."""
    prompts = [greedy(f"{SENTENCE} {i}", i) for i in range(20)]
    answers = run(completed(engine, prompts))
    assert sorted(i for i, _ in answers) == list(range(20))
    assert dict(answers)[7] == run(collect(engine, prompts[7]))


def test_a_session_that_is_nearly_full_ends_with_length(engine: Engine, run: Any) -> None:
    """The answer stops at the session's end; that is not an error."""
    prompt_tokens = run(collect(engine, greedy("circle " * 100))).prompt_tokens
    per_word = max(1, round(prompt_tokens / 100))
    text = "circle " * ((SESSION_LEN - 40) // per_word)
    answer = run(collect(engine, greedy(text, max_tokens=5000, min_new_tokens=5000)))
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + answer.completion_tokens <= SESSION_LEN


def test_health_is_good_after_all_that(engine: Engine) -> None:
    """No test above made the engine sick."""
    assert engine.health().ok


def test_close_may_be_called_twice(kind: Kind, runner: asyncio.Runner) -> None:
    """The second time does nothing."""
    engine = kind.make()
    runner.run(engine.setup())
    runner.run(engine.close())
    runner.run(engine.close())
