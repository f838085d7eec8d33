"""What the contract suite does not ask of the lmdeploy engine. Needs a GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from PIL import ImageFile

from shared.errors import (
    ContextLengthExceeded,
    EngineSetupFailed,
    EngineUnavailable,
    ImageError,
    ImageTruncated,
    InvalidRequest,
    RemoteCodeRefused,
    RequestAborted,
)
from shared.settings import ImageSettings
from tests.contract.conftest import has_gpu
from tests.gpu.asking import about, completed, file_of, picture
from tests.gpu.walking_model import write_text_model, write_walking
from workers.inference.engines.base import (
    Completion,
    EngineSpec,
    Image,
    Prompt,
    Sampling,
    Tiling,
    Turn,
    collect,
)
from workers.inference.engines.lmdeploy_engine import LmdeployEngine
from workers.inference.engines.lmdeploy_prompts import messages_of
from workers.inference.images import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not has_gpu(), reason="no GPU"),
]

T = TypeVar("T")
SESSION_LEN = 4096
TILE_TOKENS = 256
OPTIONS = {"cache_max_entry_count": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternVL2 that carries code of its own."""
    folder: Path = tmp_path_factory.mktemp("models") / "walking"
    write_walking(folder, with_code=True)
    return folder


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop, because an engine lives on one."""
    with asyncio.Runner() as running:
        yield running


@pytest.fixture(scope="module", params=["turbomind", "pytorch"])
def engine(
    request: pytest.FixtureRequest, model: Path, runner: asyncio.Runner
) -> Iterator[LmdeployEngine]:
    """Each backend in turn."""
    made = LmdeployEngine(
        EngineSpec(
            "m",
            path=str(model),
            trust_remote_code=True,
            session_len=SESSION_LEN,
            options={"backend": request.param, **OPTIONS},
        )
    )
    runner.run(made.setup())
    yield made
    runner.run(made.close())


@pytest.fixture
def run(runner: asyncio.Runner) -> Any:
    """Run a coroutine on the engine's loop."""

    def _run(work: Coroutine[Any, Any, T]) -> T:
        return runner.run(work)

    return _run


def test_the_image_reaches_the_model(engine: LmdeployEngine, run: Any) -> None:
    """Eight pictures have several answers; each picture has its own every time."""
    images = [file_of(picture(seed)) for seed in range(8)]
    alone = [run(collect(engine, about(image))) for image in images]
    together = run(completed(engine, [about(image, prompt_id=i) for i, image in enumerate(images)]))
    assert [together[i] for i in range(8)] == alone
    assert len({answer.text for answer in alone}) > 2
    assert all(answer.prompt_tokens > TILE_TOKENS for answer in alone)


def test_raw_pixels_are_the_same_image_as_their_file(engine: LmdeployEngine, run: Any) -> None:
    """An image in ``rgb`` is answered as the lossless file of it."""
    drawn = picture(3)
    raw = Image(drawn.tobytes(), "rgb", drawn.width, drawn.height)
    assert run(collect(engine, about(raw))) == run(collect(engine, about(file_of(drawn))))


@pytest.mark.parametrize("size", [(448, 448), (1920, 1080), (300, 1000), (61, 47)])
def test_images_cut_beforehand_are_what_lmdeploy_makes_itself(
    engine: LmdeployEngine, run: Any, size: tuple[int, int]
) -> None:
    """The same token ids, the same pixel values bit for bit, and so the same answer."""
    file = file_of(picture(11, *size), "JPEG")
    tiling = engine.tiling()
    assert tiling == Tiling(448, 1, 12, thumbnail=True)
    tiles = prepare(file.data, ImageSettings(scaling="exact"), tiling)
    loaded = engine._loaded
    assert loaded is not None
    assert loaded.ready is not None
    ready = loaded.ready.inputs(about(tiles), loaded.ready.pixels(about(tiles)))

    async def theirs() -> Any:
        messages = messages_of(about(file), tiled=True)
        request = await loaded.engine.preprocess(messages, session_id=loaded.pipe.session_mgr.get())
        loaded.pipe.session_mgr.remove(request.session)
        return request.inputs

    own = asyncio.run_coroutine_threadsafe(theirs(), loaded.loop).result()
    assert ready["input_ids"] == own["input_ids"]
    (ours,), (its,) = ready["multimodal"], own["multimodal"]
    assert ours["pixel_values"].dtype == its["pixel_values"].dtype
    assert bool((ours["pixel_values"] == its["pixel_values"]).all())
    for key in ("offset", "image_tokens", "image_token_id"):
        assert ours[key] == its[key]
    assert run(collect(engine, about(tiles))) == run(collect(engine, about(file)))


def test_an_image_cut_for_another_model_is_refused_alone(engine: LmdeployEngine, run: Any) -> None:
    """Its neighbour is answered."""
    wrong = Image(b"\0" * 1000, "tiles", 448, 448, tile_px=448)
    right = prepare(file_of(picture(2)).data, ImageSettings(), engine.tiling())
    answers = run(completed(engine, [about(wrong), about(right, prompt_id=2)]))
    assert isinstance(answers[1], ImageError)
    assert isinstance(answers[2], Completion)


def test_a_text_that_spells_the_models_own_mark_is_refused(
    engine: LmdeployEngine, run: Any
) -> None:
    """Otherwise it would stand where the image should."""
    tiles = prepare(file_of(picture(2)).data, ImageSettings(), engine.tiling())
    prompt = Prompt(1, [Turn("user", [0, "what is <IMG_CONTEXT>"])], Sampling(), [tiles])
    (answer,) = run(completed(engine, [prompt])).values()
    assert isinstance(answer, InvalidRequest)


def test_low_detail_is_one_tile(engine: LmdeployEngine, run: Any) -> None:
    """A wide picture is three tiles and a thumbnail; of low detail, one tile."""
    wide = file_of(picture(1, 1344, 448))

    def tokens(detail: Literal["auto", "low"]) -> int:
        answer = run(collect(engine, about(Image(wide.data, detail=detail))))
        return int(answer.prompt_tokens)

    assert tokens("auto") - tokens("low") == 3 * TILE_TOKENS


def test_half_an_image_is_refused_and_its_neighbour_is_not(
    engine: LmdeployEngine, run: Any
) -> None:
    """lmdeploy would caption it; Pillow's switch for that stays off."""
    whole = file_of(picture(2), "JPEG")
    half = Image(whole.data[: len(whole.data) // 2])
    answers = run(completed(engine, [about(half), about(whole, prompt_id=2)]))
    assert isinstance(answers[1], ImageTruncated)
    assert isinstance(answers[2], Completion)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_images_beyond_the_session_fail_alone(engine: LmdeployEngine, run: Any) -> None:
    """Seventeen tiles do not fit into 4,096 tokens."""
    image = file_of(picture(5))
    answers = run(completed(engine, [about(*[image] * 17), about(image, prompt_id=2)]))
    assert isinstance(answers[1], ContextLengthExceeded)
    assert isinstance(answers[2], Completion)


def test_a_seed_makes_sampling_repeatable(engine: LmdeployEngine, run: Any) -> None:
    """The same seed, the same answer; also a negative one."""
    prompt = about(file_of(picture(4)), temperature=2.0, top_k=0, top_p=1.0, seed=-7)
    assert run(collect(engine, prompt)) == run(collect(engine, prompt))


def test_many_aborted_requests_leave_the_engine_free(engine: LmdeployEngine, run: Any) -> None:
    """All of 64 are aborted at different stages, then new ones are answered."""
    image = file_of(picture(6))

    async def scenario() -> tuple[dict[int, Any], Completion]:
        prompts = [
            about(image, prompt_id=i, max_tokens=3000, min_new_tokens=3000) for i in range(64)
        ]
        work = asyncio.ensure_future(completed(engine, prompts))
        for i in range(64):
            await asyncio.sleep(0.02)
            await engine.abort(i)
        return await work, await collect(engine, about(image))

    answers, after = run(scenario())
    assert all(isinstance(answer, RequestAborted) for answer in answers.values())
    assert after.completion_tokens == 12
    assert engine.health().ok


def test_code_of_its_own_needs_consent(model: Path, run: Any) -> None:
    """Without trust_remote_code the folder is refused, and none of its code runs."""
    engine = LmdeployEngine(EngineSpec("m", path=str(model)))
    with pytest.raises(RemoteCodeRefused):
        run(engine.setup())


@pytest.mark.parametrize("backend", ["auto", "pytorch"])
def test_an_internvl_without_code_needs_no_consent(tmp_path: Path, run: Any, backend: str) -> None:
    """Both backends read it; TurboMind is the default."""
    write_walking(tmp_path / "model")
    options = {"backend": backend, **OPTIONS}
    engine = LmdeployEngine(
        EngineSpec("m", path=str(tmp_path / "model"), session_len=SESSION_LEN, options=options)
    )
    run(engine.setup())
    assert ("turbomind" in engine.health().detail) == (backend == "auto")
    assert run(collect(engine, about(file_of(picture(7))))).completion_tokens == 12
    run(engine.close())


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_a_language_model_answers_and_has_no_eyes(tmp_path: Path, run: Any, backend: str) -> None:
    """Text is answered; an image is an error of its own request."""
    write_text_model(tmp_path)
    options = {"backend": backend, **OPTIONS}
    engine = LmdeployEngine(
        EngineSpec("m", path=str(tmp_path), session_len=SESSION_LEN, options=options)
    )
    run(engine.setup())
    answers = run(completed(engine, [about(), about(file_of(picture(0)), prompt_id=2)]))
    run(engine.close())
    assert answers[1].completion_tokens == 12
    assert isinstance(answers[2], InvalidRequest)


def test_close_answers_those_inside_and_queued(model: Path, run: Any) -> None:
    """More requests than a batch holds: all end at once, and close returns."""

    async def scenario() -> dict[int, Any]:
        engine = LmdeployEngine(
            EngineSpec(
                "m",
                path=str(model),
                trust_remote_code=True,
                max_running=4,
                session_len=SESSION_LEN,
                options=OPTIONS,
            )
        )
        await engine.setup()
        prompts = [about(prompt_id=i, max_tokens=3000, min_new_tokens=3000) for i in range(40)]
        work = asyncio.ensure_future(completed(engine, prompts))
        await asyncio.sleep(0.3)
        await engine.close()
        assert not engine._working, "lmdeploy still works on requests"
        return await work

    answers = run(scenario())
    assert len(answers) == 40
    assert all(isinstance(answer, EngineUnavailable) for answer in answers.values())


def test_a_damaged_model_is_a_failed_setup(model: Path, tmp_path: Path, run: Any) -> None:
    """A folder whose weights are cut short, and one without a config."""
    for name, spoil in (("cut", True), ("bare", False)):
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            if file.is_file() and (spoil or file.name != "config.json"):
                data = file.read_bytes()
                cut = spoil and file.suffix == ".safetensors"
                (folder / file.name).write_bytes(data[: len(data) // 2] if cut else data)
        engine = LmdeployEngine(EngineSpec("m", path=str(folder), trust_remote_code=True))
        with pytest.raises(EngineSetupFailed):
            run(engine.setup())
