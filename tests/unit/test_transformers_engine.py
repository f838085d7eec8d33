"""The embedded engine on the tiny checkpoint: what it says, and how requests share it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.errors import (
    ContextLengthExceeded,
    EngineError,
    EngineSetupFailed,
    EngineUnavailable,
    ImageTruncated,
    InvalidValue,
    RemoteCodeRefused,
    RequestAborted,
    VlmqError,
)
from workers.inference.engines.base import (
    Completion,
    Delta,
    EngineSpec,
    Image,
    Prompt,
    Sampling,
    Turn,
    collect,
)
from workers.inference.engines.transformers_engine import TransformersEngine
from workers.inference.internvl.batch import Batch, Request
from workers.inference.internvl.export import export_with_code
from workers.inference.tiny import CHECKPOINT, scenes

GREEDY = Sampling(temperature=0)
WILD = Sampling(temperature=2.0, top_p=1.0, top_k=0, max_tokens=24, min_new_tokens=24)
SPEC = EngineSpec("tiny", path=str(CHECKPOINT), max_running=8, options={"threads": 1})

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the module, because an engine lives on one."""
    with asyncio.Runner() as running:
        yield running


@pytest.fixture(scope="module")
def run(runner: asyncio.Runner) -> Run:
    """Run a coroutine on the engine's loop."""
    return runner.run


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner) -> Iterator[TransformersEngine]:
    """The engine, set up once."""
    made = TransformersEngine(SPEC)
    runner.run(made.setup())
    yield made
    runner.run(made.close())


def _picture(index: int, *, detail: Any = "auto", size_px: int = scenes.DEFAULT_SIZE_PX) -> Image:
    encoding: Any = "png" if index % 2 else "jpeg"
    return Image(
        scenes.encoded(scenes.scene("held_out", index, size_px).image, encoding), detail=detail
    )


def _caption(index: int, size_px: int = scenes.DEFAULT_SIZE_PX) -> str:
    return scenes.scene("held_out", index, size_px).caption


def _asked(index: int, sampling: Sampling = GREEDY, *, prompt_id: int | None = None) -> Prompt:
    turns = [Turn("user", [0, scenes.PROMPT])]
    return Prompt(index if prompt_id is None else prompt_id, turns, sampling, [_picture(index)])


def _changed(sampling: Sampling, **changes: Any) -> Sampling:
    return msgspec.structs.replace(sampling, **changes)


async def _completed(engine: TransformersEngine, prompts: list[Prompt]) -> dict[int, Any]:
    return {number: answer async for number, answer in engine.complete(prompts)}


async def _deltas(engine: TransformersEngine, prompt: Prompt) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt)]


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - what is watched announces nothing
        await asyncio.sleep(0.002)


def test_held_out_scenes_are_captioned_exactly(engine: TransformersEngine, run: Run) -> None:
    """At least 95 of 100 JPEG and PNG files that it never saw."""
    answers = run(_completed(engine, [_asked(index) for index in range(100)]))
    right = [index for index, answer in answers.items() if answer.text == _caption(index)]
    assert len(right) >= 95
    assert all(answer.finish_reason == "stop" for answer in answers.values())


def test_pictures_of_several_tiles_are_captioned_too(engine: TransformersEngine, run: Run) -> None:
    """A larger file is cut into a grid and a thumbnail: more tokens, the same kind of answer."""
    turns = [Turn("user", [0, scenes.PROMPT])]
    prompts = [Prompt(i, turns, GREEDY, [_picture(i, size_px=200)]) for i in range(20)]
    answers = run(_completed(engine, prompts))
    assert sum(answers[i].text == _caption(i, 200) for i in range(20)) >= 18
    small = run(collect(engine, _asked(0)))
    assert answers[0].prompt_tokens == small.prompt_tokens + 9 * 4
    low = Prompt(0, turns, GREEDY, [_picture(0, detail="low", size_px=200)])
    assert run(collect(engine, low)).prompt_tokens == small.prompt_tokens


def test_an_image_in_a_later_turn_is_the_one_spoken_of(
    engine: TransformersEngine, run: Run
) -> None:
    """History is kept: two images in two turns, and the answer is about the second."""
    first, second = 4, 9
    turns = [
        Turn("user", [0, scenes.PROMPT]),
        Turn("assistant", [_caption(first)]),
        Turn("user", [1, scenes.PROMPT]),
    ]
    images = [_picture(first), _picture(second)]
    answer = run(collect(engine, Prompt(1, turns, GREEDY, images)))
    assert answer.text == _caption(second)
    swapped = run(collect(engine, Prompt(1, turns, GREEDY, images[::-1])))
    assert swapped.text == _caption(first)


def test_an_image_may_stand_after_the_text(engine: TransformersEngine, run: Run) -> None:
    """The part's place in the turn is the tokens' place in the prompt."""
    prompt = Prompt(1, [Turn("user", [scenes.PROMPT, 0])], GREEDY, [_picture(6)])
    assert run(collect(engine, prompt)).text == _caption(6)


def test_raw_pixels_are_answered_like_the_file(engine: TransformersEngine, run: Run) -> None:
    """What a consumer decoded and prepared needs no file format."""
    picture = scenes.scene("held_out", 7).image
    raw = Image(picture.tobytes(), "rgb", *picture.size)
    prompt = Prompt(1, [Turn("user", [0, scenes.PROMPT])], GREEDY, [raw])
    assert run(collect(engine, prompt)) == run(collect(engine, _asked(7)))


def test_streamed_pieces_make_the_whole_answer(engine: TransformersEngine, run: Run) -> None:
    """More than one delta, only the last with a reason, and the same text as in a batch."""
    deltas = run(_deltas(engine, _asked(3)))
    assert len(deltas) > 4
    assert [bool(delta.finish_reason) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    whole = run(_completed(engine, [_asked(3)]))[3]
    assert whole.text == "".join(delta.text for delta in deltas) == _caption(3)
    assert whole.completion_tokens == deltas[-1].completion_tokens > 4


def test_a_seed_gives_the_same_text_in_any_company(engine: TransformersEngine, run: Run) -> None:
    """Alone, streamed, or among others that join and leave; another seed gives another text."""
    seeded = _changed(WILD, seed=42)
    alone = run(collect(engine, _asked(1, seeded, prompt_id=99)))
    others = [
        _asked(i, _changed(WILD, seed=i, max_tokens=3 + i, min_new_tokens=0)) for i in range(12)
    ]
    company = run(_completed(engine, [*others[:6], _asked(1, seeded, prompt_id=99), *others[6:]]))
    assert company[99] == alone
    other = run(collect(engine, _asked(1, _changed(WILD, seed=43))))
    assert other.text != alone.text


def test_unseeded_requests_differ(engine: TransformersEngine, run: Run) -> None:
    """Without a seed each request draws its own numbers."""
    answers = run(_completed(engine, [_asked(1, WILD, prompt_id=i) for i in range(4)]))
    assert len({answer.text for answer in answers.values()}) > 1


def test_more_requests_than_rows_are_all_answered(engine: TransformersEngine, run: Run) -> None:
    """Five times what runs at once, of many lengths: as each would be alone."""
    prompts = [_asked(i, _changed(GREEDY, max_tokens=1 + i % 7)) for i in range(40)]
    answers = run(_completed(engine, prompts))
    assert sorted(answers) == list(range(40))
    for index in (0, 13, 39):
        assert answers[index] == run(collect(engine, prompts[index]))
    assert {answers[i].completion_tokens for i in range(7)} == set(range(1, 8))


def test_a_bad_image_fails_only_its_request(engine: TransformersEngine, run: Run) -> None:
    """Cut in half: its reason is told, the neighbours are answered."""
    whole = _picture(2).data
    turns = [Turn("user", [0, scenes.PROMPT])]
    broken = Prompt(50, turns, GREEDY, [Image(whole[: len(whole) * 2 // 3])])
    answers = run(_completed(engine, [_asked(1), broken, _asked(3)]))
    assert isinstance(answers[50], ImageTruncated)
    assert answers[1].text == _caption(1)
    assert answers[3].text == _caption(3)


def test_a_reference_to_no_image_is_a_bad_request(engine: TransformersEngine, run: Run) -> None:
    """Nor is an empty stop string taken."""
    with pytest.raises(InvalidValue, match="image 3"):
        run(collect(engine, Prompt(1, [Turn("user", [3])], GREEDY)))
    with pytest.raises(InvalidValue, match="stop"):
        run(collect(engine, _asked(1, _changed(GREEDY, stop=[""]))))
    assert run(collect(engine, _asked(1))).text == _caption(1)


def test_stop_strings_across_tokens_are_not_shown(engine: TransformersEngine, run: Run) -> None:
    """The string spans three tokens; nothing of it comes out."""
    words = _caption(5).split()
    stop = f"{words[2][-2:]} {words[3]} {words[4][:1]}"
    deltas = run(_deltas(engine, _asked(5, _changed(GREEDY, stop=["zzz", stop]))))
    assert "".join(delta.text for delta in deltas) == _caption(5)[: _caption(5).index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_random_bytes_stream_as_whole_characters(engine: TransformersEngine, run: Run) -> None:
    """At a wild temperature the model spells broken UTF-8; pieces and whole still agree."""
    wilder = _changed(WILD, temperature=50.0, seed=3, max_tokens=120, min_new_tokens=120)
    deltas = run(_deltas(engine, _asked(1, wilder)))
    whole = run(_completed(engine, [_asked(1, wilder)]))[1]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert whole.completion_tokens == 120


def test_the_session_bounds_prompt_and_answer(runner: asyncio.Runner) -> None:
    """Too long a prompt is refused; a fitting one gets the room that is left."""
    engine = TransformersEngine(EngineSpec("tiny", path=str(CHECKPOINT), session_len=48))

    async def scenario() -> tuple[Any, Completion]:
        await engine.setup()
        try:
            big = Prompt(1, [Turn("user", [0, scenes.PROMPT])], GREEDY, [_picture(1, size_px=240)])
            refused = (await _completed(engine, [big]))[1]
            return refused, await collect(
                engine, _asked(1, _changed(WILD, max_tokens=500, min_new_tokens=500))
            )
        finally:
            await engine.close()

    refused, clipped = runner.run(scenario())
    assert isinstance(refused, ContextLengthExceeded)
    assert "40 of them for images" in refused.message
    assert clipped.finish_reason == "length"
    assert clipped.prompt_tokens + clipped.completion_tokens == 48


def test_an_abort_frees_the_row_at_the_next_step(engine: TransformersEngine, run: Run) -> None:
    """Endless requests fill every row; once they are aborted a new one runs."""
    full = f"{SPEC.max_running} running, 0 waiting"

    async def scenario() -> tuple[list[Any], Completion]:
        endless = _changed(WILD, max_tokens=7000, min_new_tokens=7000)
        tasks = [
            asyncio.create_task(collect(engine, _asked(i, endless, prompt_id=i)))
            for i in range(SPEC.max_running)
        ]
        await _until(lambda: engine.health().detail == full)
        for number in range(SPEC.max_running):
            await engine.abort(number)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return outcomes, await collect(engine, _asked(1, prompt_id=500))

    outcomes, answer = run(scenario())
    assert all(isinstance(outcome, RequestAborted) for outcome in outcomes)
    assert answer.text == _caption(1)


def test_a_stream_does_not_queue_behind_a_batch(engine: TransformersEngine, run: Run) -> None:
    """With a whole chunk inside, a chat is answered before most of the chunk."""

    async def scenario() -> int:
        done: list[int] = []

        async def chunk() -> None:
            async for number, _ in engine.complete([_asked(i) for i in range(120)]):
                done.append(number)

        working = asyncio.create_task(chunk())
        await _until(lambda: bool(done))
        await collect(engine, _asked(1, prompt_id=999))
        before = len(done)
        await working
        return before

    assert run(scenario()) < 60


def test_a_failing_step_fails_its_requests_and_not_the_engine(
    engine: TransformersEngine, run: Run
) -> None:
    """A prompt the network cannot take is told so; those that joined with it are answered."""
    batch = engine._batch
    assert isinstance(batch, Batch)
    whole: list[Request] = []
    original = engine._prepare

    def breaking(flight: Any, loaded: Any) -> Request:
        request = original(flight, loaded)
        if flight.prompt.id == 7:
            request = replace(request, ids=[10**6, *request.ids])
        whole.append(request)
        return request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_prepare", breaking)
        answers = run(_completed(engine, [_asked(6), _asked(7), _asked(8)]))
    assert isinstance(answers[7], EngineError)
    assert answers[6].text == _caption(6)
    assert answers[8].text == _caption(8)
    assert engine.health().ok


def test_a_checkpoint_with_code_needs_consent_and_then_answers_alike(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    """The published interface gives the same captions, with seeds, stops and several at once."""
    folder = tmp_path / "tiny_published"
    export_with_code(CHECKPOINT, folder)
    with pytest.raises(RemoteCodeRefused):
        runner.run(TransformersEngine(EngineSpec("tiny", path=str(folder))).setup())
    engine = TransformersEngine(EngineSpec("tiny", path=str(folder), trust_remote_code=True))

    async def scenario() -> dict[int, Any]:
        await engine.setup()
        try:
            return await _completed(engine, [_asked(index) for index in range(10)])
        finally:
            await engine.close()

    answers = runner.run(scenario())
    assert [answers[i].text for i in range(10)] == [_caption(i) for i in range(10)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"speed": 3}, "speed"),
        ({"threads": "two"}, "threads"),
        ({"dtype": "int4"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
    ],
)
def test_wrong_options_are_named_at_setup(
    runner: asyncio.Runner, options: dict[str, Any], told: str
) -> None:
    """Unknown names, wrong types, impossible values."""
    engine = TransformersEngine(EngineSpec("tiny", path=str(CHECKPOINT), options=options))
    with pytest.raises(EngineSetupFailed, match=told):
        runner.run(engine.setup())


def test_a_broken_checkpoint_fails_setup_and_health(runner: asyncio.Runner, tmp_path: Path) -> None:
    """The engine says what is missing, is not healthy, and refuses requests."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    engine = TransformersEngine(EngineSpec("tiny", path=str(folder)))
    with pytest.raises(EngineSetupFailed, match=r"model\.safetensors"):
        runner.run(engine.setup())
    assert not engine.health().ok
    with pytest.raises(EngineUnavailable):
        runner.run(collect(engine, _asked(1)))


def test_closing_ends_what_is_inside(runner: asyncio.Runner) -> None:
    """A request in flight fails with EngineUnavailable; nothing hangs, and health says so."""

    async def scenario() -> tuple[Any, bool]:
        engine = TransformersEngine(SPEC)
        await engine.setup()
        endless = _changed(WILD, max_tokens=7000, min_new_tokens=7000)
        task = asyncio.create_task(collect(engine, _asked(1, endless)))
        await _until(lambda: engine.health().detail == "1 running, 0 waiting")
        await engine.close()
        [outcome] = await asyncio.gather(task, return_exceptions=True)
        return outcome, engine.health().ok

    outcome, healthy = runner.run(scenario())
    assert isinstance(outcome, VlmqError)
    assert isinstance(outcome, EngineUnavailable)
    assert not healthy
