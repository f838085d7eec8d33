"""The lmdeploy engine's words, without lmdeploy and without a GPU."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image as Pillow

from shared.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    EngineError,
    EngineSetupFailed,
    EngineUnavailable,
    ImageError,
    ImageTruncated,
    ImageUnreadable,
    InvalidRequest,
    InvalidValue,
    RemoteCodeRefused,
    RequestAborted,
    VlmqError,
)
from workers.inference.engines.base import EngineSpec, Image, Prompt, Sampling, Tiling, Turn
from workers.inference.engines.lmdeploy_engine import LmdeployEngine, error_for
from workers.inference.engines.lmdeploy_loading import check_remote_code, runs_language_model
from workers.inference.engines.lmdeploy_options import (
    GpuMemory,
    Options,
    backend_settings,
    cache_share,
    generation_settings,
    read_options,
)
from workers.inference.engines.lmdeploy_prompts import ReadyPrompts, messages_of


def file_of(width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
    """An image file of one colour."""
    out = io.BytesIO()
    Pillow.new("RGB", (width, height), (200, 30, 30)).save(out, kind)
    return out.getvalue()


def prompt_of(*parts: str | int, images: list[Image] | None = None) -> Prompt:
    """A prompt of one user turn."""
    return Prompt(1, [Turn("user", list(parts))], Sampling(), images or [])


@pytest.mark.parametrize(
    ("config", "runs"),
    [
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, True),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, False),
        ({"architectures": ["Qwen2ForCausalLM"]}, True),
        ({"llm_config": {}}, True),
    ],
)
def test_turbomind_takes_an_internvl_by_the_language_model_inside(
    tmp_path: Path, config: dict[str, Any], runs: bool
) -> None:
    """lmdeploy looks at the outer architecture alone, and would choose it for InternVL2-4B."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert runs_language_model(tmp_path, {"InternLM2ForCausalLM", "InternVLChatModel"}) == runs


def test_options_have_defaults() -> None:
    """Nothing needs to be said."""
    assert read_options({}) == Options()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend": "vllm"}, "backend"),
        ({"tp": 0}, "tp"),
        ({"tp": "two"}, "tp"),
        ({"cache_max_entry_count": 1.5}, "cache_max_entry_count"),
        ({"cache_max_entry_count": 0}, "cache_max_entry_count"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_prefill_token_num": -1}, "max_prefill_token_num"),
        ({"quant_policy": 5}, "quant_policy"),
        ({"preprocess_threads": 0}, "preprocess_threads"),
        ({"chat_template": 3}, "chat_template"),
        ({"log_level": "LOUD"}, "log_level"),
        ({"colour": "red"}, "colour"),
        ({"backend": "turbomind", "quant_policy": 16}, "TurboMind has no quant_policy 16"),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, Any], says: str) -> None:
    """The engine is not even made."""
    with pytest.raises(ConfigurationError, match=says):
        LmdeployEngine(EngineSpec("m", options=given))


def test_a_batch_holds_what_runs_unless_told_otherwise() -> None:
    """So nothing queues inside lmdeploy."""
    spec = EngineSpec("m", session_len=2048, max_running=96)
    settings = backend_settings(Options(), spec)
    assert settings["max_batch_size"] == 96
    assert settings["session_len"] == 2048
    assert "max_prefill_token_num" not in settings
    told = backend_settings(Options(max_batch_size=7, max_prefill_token_num=99, tp=2), spec)
    assert (told["max_batch_size"], told["max_prefill_token_num"], told["tp"]) == (7, 99, 2)


def test_more_of_lmdeploys_configuration_is_passed_on_by_name() -> None:
    """But what has an option of its own is not said twice."""
    told = backend_settings(Options(extra={"max_prefill_iters": 2}), EngineSpec("m"))
    assert told["max_prefill_iters"] == 2
    for name in ("tp", "session_len", "max_prefill_token_num"):
        with pytest.raises(ConfigurationError, match=name):
            backend_settings(Options(extra={name: 1}), EngineSpec("m"))


GIB = 2**30


@pytest.mark.parametrize(
    ("share", "free_gib", "given", "expected"),
    [
        (None, 139, None, 0.8),
        (0.5, 139, 0.3, 0.3),
        # 70 GiB, less 4 of weights and 7 in reserve, of the 136 left beside the weights.
        (0.5, 140, None, 59 / 136),
        # The second of two replicas: the first one's 70 GiB are gone.
        (0.5, 70, None, 59 / 66),
        (1.0, 140, None, 122 / 136),
        (1.0, 100, None, 0.92),
    ],
)
def test_replicas_share_a_gpu_by_what_each_may_hold(
    share: float | None, free_gib: int, given: float | None, expected: float
) -> None:
    """lmdeploy counts from what is free, so the same share is another part for each."""
    memory = GpuMemory(140 * GIB, free_gib * GIB, 4 * GIB)
    spec = EngineSpec("m", memory_share=share)
    found = cache_share(Options(cache_max_entry_count=given), spec, memory)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_share_that_cannot_hold_the_model_is_refused_with_the_figures() -> None:
    """Before anything is loaded."""
    memory = GpuMemory(80 * GIB, 80 * GIB, 12 * GIB)
    with pytest.raises(EngineSetupFailed, match=r"12\.0 GiB.*memory_share"):
        cache_share(Options(), EngineSpec("m", memory_share=0.05), memory)


@pytest.mark.parametrize("given", [None, 0.95])
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_gpu_without_room_for_the_weights_is_refused_whatever_was_set(
    share: float | None, given: float | None
) -> None:
    """TurboMind would abort its process instead of saying so."""
    memory = GpuMemory(80 * GIB, 3 * GIB, 12 * GIB)
    with pytest.raises(EngineSetupFailed, match=r"12\.0 GiB.*3\.0 GiB"):
        cache_share(
            Options(cache_max_entry_count=given), EngineSpec("m", memory_share=share), memory
        )


def test_temperature_zero_takes_the_likeliest_token_and_keeps_the_penalty() -> None:
    """One candidate, whatever else was asked, with the repetition penalty in force."""
    settings = generation_settings(
        Sampling(temperature=0.0, top_k=40, top_p=0.5, repetition_penalty=1.3)
    )
    assert (settings["top_k"], settings["top_p"], settings["temperature"]) == (1, 1.0, 1.0)
    assert settings["repetition_penalty"] == 1.3
    assert settings["do_sample"] is True


def test_sampling_is_passed_on() -> None:
    """top_k 0 stays lmdeploy's off; a larger one than its kernels sort is cut."""
    settings = generation_settings(Sampling(temperature=0.7, top_k=0, top_p=0.9, max_tokens=5))
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.7, 0, 0.9)
    assert settings["max_new_tokens"] == 5
    assert generation_settings(Sampling(top_k=1_000_000))["top_k"] == 1024


def test_seeds_fit_into_64_bits_without_a_sign() -> None:
    """Different seeds stay different; none stays none."""
    seeds = [-(2**63), -1, 0, 7, 2**63 - 1]
    mapped = [generation_settings(Sampling(seed=seed))["random_seed"] for seed in seeds]
    assert len(set(mapped)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in mapped)
    assert generation_settings(Sampling())["random_seed"] is None


def test_fewest_tokens_never_exceed_the_most() -> None:
    """lmdeploy would drop such a minimum."""
    settings = generation_settings(Sampling(max_tokens=5, min_new_tokens=12))
    assert settings["min_new_tokens"] == 5


@pytest.mark.parametrize(
    ("code", "images", "kind"),
    [
        ("context_length_exceeded", False, ContextLengthExceeded),
        ("invalid_request", False, InvalidRequest),
        ("unsupported_feature", True, InvalidRequest),
        ("preprocess_failed", True, ImageError),
        ("preprocess_failed", False, EngineError),
        ("request_cancelled", False, RequestAborted),
        ("engine_unavailable", False, EngineUnavailable),
        ("request_conflict", False, EngineError),
        ("internal_error", True, EngineError),
        ("something new", False, EngineError),
    ],
)
def test_every_error_code_has_a_word_of_ours(
    code: str, images: bool, kind: type[VlmqError]
) -> None:
    """Exactly this class, because its code is what clients see."""
    assert type(error_for(code, "why", images=images)) is kind


def test_text_is_one_string_with_its_parts_apart() -> None:
    """lmdeploy itself puts nothing between the parts of a message with images."""
    [message] = messages_of(prompt_of("one", "two ", "three"), tiled=True)
    assert message == {"role": "user", "content": "one\ntwo three"}


def test_an_image_stands_where_its_part_stands() -> None:
    """Decoded, and in the order of the parts."""
    images = [Image(file_of(8, 8)), Image(file_of(16, 8))]
    [message] = messages_of(prompt_of("look", 1, 0, "why", images=images), tiled=True)
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_data", "image_data", "text"]
    pictures = [part["image_data"]["data"] for part in message["content"][1:3]]
    assert [picture.size for picture in pictures] == [(16, 8), (8, 8)]
    assert message["content"][0]["text"] == "look\n"


def test_raw_pixels_become_the_picture_they_are() -> None:
    """Row by row, three bytes each."""
    raw = Image(bytes(range(12)), "rgb", 2, 2)
    [message] = messages_of(prompt_of(0, images=[raw]), tiled=True)
    assert message["content"][0]["image_data"]["data"].tobytes() == bytes(range(12))


def test_low_detail_is_one_tile_or_a_small_picture() -> None:
    """A limit of tiles where the model has tiles, fewer pixels where it has none."""
    prompt = prompt_of(0, images=[Image(file_of(1600, 800), detail="low")])
    [message] = messages_of(prompt, tiled=True)
    assert message["content"][0]["image_data"]["max_dynamic_patch"] == 1
    assert message["content"][0]["image_data"]["data"].size == (1600, 800)
    [message] = messages_of(prompt, tiled=False)
    assert message["content"][0]["image_data"]["data"].size == (448, 224)
    [message] = messages_of(prompt_of(0, images=[Image(file_of(1600, 800))]), tiled=False)
    assert message["content"][0]["image_data"]["data"].size == (1600, 800)


def test_an_image_that_is_broken_or_missing_has_its_own_error() -> None:
    """No image, half an image, an index without an image."""
    whole = file_of(640, 640, "JPEG")
    half = whole[: len(whole) // 2]
    for image, kind in ((b"no image", ImageUnreadable), (half, ImageTruncated)):
        with pytest.raises(kind):
            messages_of(prompt_of(0, images=[Image(image)]), tiled=True)
    with pytest.raises(InvalidValue):
        messages_of(prompt_of(1, images=[Image(file_of())]), tiled=True)


def folder_with(folder: Path, **files: object) -> Path:
    """A model folder with JSON files."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


CODE = {"AutoConfig": "configuration_x.X"}


def test_code_that_is_needed_is_refused_without_consent(tmp_path: Path) -> None:
    """In the config or in the tokenizer's; with consent it is let through."""
    folder = folder_with(tmp_path, config={"model_type": "x", "auto_map": CODE})
    with pytest.raises(RemoteCodeRefused, match=r"config\.json"):
        check_remote_code(folder, trusted=False, known=lambda _: False)
    check_remote_code(folder, trusted=True, known=lambda _: False)
    folder = folder_with(tmp_path, config={"model_type": "x"}, tokenizer_config={"auto_map": CODE})
    with pytest.raises(RemoteCodeRefused, match=r"tokenizer_config\.json"):
        check_remote_code(folder, trusted=False, known=lambda _: False)


def test_code_that_nobody_needs_is_not_refused(tmp_path: Path) -> None:
    """transformers knows the model itself, or there is no code."""
    folder = folder_with(tmp_path, config={"model_type": "llava", "auto_map": CODE})
    check_remote_code(folder, trusted=False, known=lambda name: name == "llava")
    folder = folder_with(tmp_path, config={"model_type": "x"})
    check_remote_code(folder, trusted=False, known=lambda _: False)


def test_a_config_that_is_no_json_is_a_failed_setup(tmp_path: Path) -> None:
    """Said before lmdeploy sees it."""
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(EngineSetupFailed, match=r"config\.json"):
        check_remote_code(tmp_path, trusted=False, known=lambda _: False)


def test_setup_says_which_folder_is_missing(tmp_path: Path) -> None:
    """Also when no path was given at all."""
    for path in (None, str(tmp_path / "nowhere")):
        with pytest.raises(EngineSetupFailed, match=f"no model folder {path}"):
            asyncio.run(LmdeployEngine(EngineSpec("m", path=path)).setup())


@pytest.mark.skipif(
    importlib.util.find_spec("lmdeploy") is not None, reason="lmdeploy is installed"
)
def test_setup_says_that_lmdeploy_is_missing(tmp_path: Path) -> None:
    """And how to get it."""
    with pytest.raises(EngineSetupFailed, match=r"install vlmq\[inference\]"):
        asyncio.run(LmdeployEngine(EngineSpec("m", path=str(tmp_path))).setup())


def test_an_engine_that_is_not_set_up_says_so() -> None:
    """Closing it does nothing, asking it is EngineUnavailable."""
    engine = LmdeployEngine(EngineSpec("m"))
    assert not engine.health().ok
    asyncio.run(engine.close())

    async def ask() -> None:
        async for _ in engine.generate(prompt_of("hello")):
            pass

    with pytest.raises(EngineUnavailable):
        asyncio.run(ask())


def test_a_text_may_not_pose_as_an_image() -> None:
    """With images or without: the engine looks for that token in all prompts of a step."""
    model = SimpleNamespace(image_token="<IMG_CONTEXT>")
    engine = SimpleNamespace(vl_encoder=SimpleNamespace(model=model))
    ready = ReadyPrompts(engine, Tiling(448))
    ready.require_plain(prompt_of("what is an <IMG> tag?"))
    with pytest.raises(InvalidValue, match="<IMG_CONTEXT>"):
        ready.require_plain(prompt_of("hello", "say <IMG_CONTEXT> again"))
