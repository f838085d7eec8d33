"""The parts of the GPU benchmark that need no GPU: pictures, accounts, FLOPs, figures."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.accounts import account
from benchmarks.gpu.clock import BudgetSpent, Clock, bounded
from benchmarks.gpu.flops import decode_flops, item_flops, prefill_flops, tile_flops
from benchmarks.gpu.mutations import mutated
from benchmarks.gpu.photos import HD, PHOTO, SMALL, Kind, picture, write_photos
from benchmarks.gpu.results import FirstTokens, Results, Throughput, figures
from benchmarks.gpu.scale import DRY
from benchmarks.gpu.setups import setup_of
from benchmarks.gpu.work import (
    NEW_TOKENS,
    WORKS,
    Expected,
    WrongAnswers,
    check_answers,
    item_lines,
)
from benchmarks.report import Figure
from shared.chat import ChatRequest, completion_body
from shared.errors import ConfigurationError, EngineCrashed
from workers.inference.batch_lines import error_line, output_line
from workers.inference.internvl.model import InternVL
from workers.inference.internvl.synthesis import INTERNVL2_2B


def encoded(kind: Kind, seed: int) -> bytes:
    """A picture's file."""
    out = io.BytesIO()
    picture(kind, seed).save(out, "JPEG", quality=85)
    return out.getvalue()


# --- pictures ---


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(SMALL, 30_000, 50_000), (HD, 200_000, 450_000), (PHOTO, 3_000_000, 4_000_000)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_pictures_weigh_what_photographs_weigh(kind: Kind, least: int, most: int) -> None:
    """Decoding a picture of the benchmark costs what decoding a photograph does."""
    data = encoded(kind, 1)
    assert least <= len(data) <= most
    assert Image.open(io.BytesIO(data)).size == (kind.width, kind.height)


def test_a_seed_is_a_picture() -> None:
    """The same seed draws the same picture, another one another."""
    assert encoded(SMALL, 3) == encoded(SMALL, 3) != encoded(SMALL, 4)


def test_links_stand_in_for_pictures_beyond_the_distinct_ones(tmp_path: Path) -> None:
    """Five files, of which two differ."""
    paths = write_photos(tmp_path, SMALL, 5, distinct=2)
    contents = [path.read_bytes() for path in paths]
    assert len(set(paths)) == 5
    assert contents == [*contents[:2], *contents[:2], contents[0]]
    assert contents[0] != contents[1]


def test_breaking_a_picture_depends_on_the_seed_alone() -> None:
    """The same thousand broken pictures in every run, nearly all of them different."""
    whole = encoded(SMALL, 1)
    broken = [mutated(whole, seed) for seed in range(200)]
    assert broken == [mutated(whole, seed) for seed in range(200)]
    assert whole not in broken
    assert len(set(broken)) > 150


# --- requests and answers ---


@pytest.mark.parametrize("work", WORKS.values(), ids=list(WORKS))
def test_a_line_is_a_request_about_its_picture(tmp_path: Path, work: Any) -> None:
    """Item N is about picture N, by path or with its bytes, and asks for exactly 64 tokens."""
    paths = write_photos(tmp_path, SMALL, 2, distinct=2)
    lines = [json.loads(line) for line in item_lines(paths, work, 3)]
    assert [line["custom_id"] for line in lines] == ["item-0", "item-1", "item-2"]
    request = msgspec.convert(lines[1]["body"], ChatRequest)
    assert (request.max_tokens, request.min_new_tokens) == (NEW_TOKENS, NEW_TOKENS)
    image = lines[1]["body"]["messages"][0]["content"][0]["image_url"]
    assert image["detail"] == work.detail
    if work.inline:
        assert base64.b64decode(image["url"].partition(",")[2]) == paths[1].read_bytes()
    else:
        assert image["url"] == str(paths[1])


def answer(number: int, tokens: int = NEW_TOKENS) -> bytes:
    """An output line as vlmq writes it."""
    body = completion_body(
        completion_id="chatcmpl-1",
        created=1,
        model="m",
        text="a word",
        finish_reason="length",
        prompt_tokens=280,
        completion_tokens=tokens,
    )
    return output_line(str(number), f"item-{number}", body)


def test_right_answers_pass() -> None:
    """In any order; the mean of the prompts' tokens comes back."""
    checked = check_answers([answer(2), answer(0), answer(1)], Expected(3, NEW_TOKENS))
    assert checked.prompt_tokens == 280


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([answer(0)], "1 of 2 items have no answer"),
        ([answer(0), answer(0), answer(1)], "item 0 was answered twice"),
        ([answer(0), answer(1, 63)], "item 1 has 63 tokens instead of 64"),
        ([answer(0), answer(1).replace(b":200", b":500")], "item 1 was answered with HTTP 500"),
    ],
)
def test_wrong_answers_are_found(lines: list[bytes], complaint: str) -> None:
    """Missing, doubled, short and failed ones."""
    with pytest.raises(WrongAnswers, match=complaint):
        check_answers(lines, Expected(2, NEW_TOKENS))


def test_every_item_is_accounted_for() -> None:
    """Answered, failed in HTTP's words or a batch's, missing, doubled."""
    crashed = error_line("1", "item-1", EngineCrashed())
    never_ran = error_line("2", "item-2", EngineCrashed("gone"), in_batch=True)
    accounts = account([answer(0), answer(0)], [crashed, never_ran], 5)
    assert (accounts.answered, accounts.failed) == (2, {EngineCrashed.code: 2})
    assert (accounts.missing, accounts.repeated, accounts.unaccounted) == (2, 1, 3)
    assert accounts.examples[EngineCrashed.code]


# --- FLOPs ---


def counted(run: Any) -> int:
    """The operations of matrix products that torch counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def model() -> InternVL:
    """InternVL2-2B without its weights."""
    with torch.device("meta"):
        return InternVL(INTERNVL2_2B).to(torch.bfloat16)


def test_the_flops_of_a_tile_are_those_that_torch_counts(model: InternVL) -> None:
    """Patches, 24 layers, projector."""
    side = INTERNVL2_2B.tile_px
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=torch.bfloat16)
    assert tile_flops(INTERNVL2_2B) == counted(lambda: model.extract_feature(pixels))


@pytest.mark.parametrize("tokens", [1, 300])
def test_the_flops_of_a_prompt_are_those_that_torch_counts(model: InternVL, tokens: int) -> None:
    """But for what need not be computed: future tokens' attention, all logits but the last."""
    language = INTERNVL2_2B.language
    ids = torch.zeros(1, tokens, device="meta", dtype=torch.long)
    seen = counted(lambda: model.language_model(model.language_model.embed(ids)))
    unseen_pairs = tokens**2 - tokens * (tokens + 1) // 2
    needless = language.num_hidden_layers * 4 * unseen_pairs * language.hidden_size
    needless += (tokens - 1) * 2 * language.hidden_size * language.vocab_size
    assert prefill_flops(language, tokens) == seen - needless


def test_an_item_is_its_tiles_its_prompt_and_a_step_per_further_token() -> None:
    """Each step attends to one token more."""
    language = INTERNVL2_2B.language
    parts = [2 * tile_flops(INTERNVL2_2B), prefill_flops(language, 600)]
    parts += [decode_flops(language, 601), decode_flops(language, 602)]
    assert item_flops(INTERNVL2_2B, tiles=2, prompt_tokens=600, new_tokens=3) == sum(parts)
    assert prefill_flops(language, 1) == decode_flops(language, 1)


# --- figures ---


def batch(side: Any, rate: float, row: str = "448") -> Throughput:
    """A timed batch of 100 items."""
    return Throughput("turbomind", row, side, 100, 100 / rate, 280)


def by_name(results: Results) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(results, INTERNVL2_2B)}


def test_the_better_round_of_raw_is_compared_with() -> None:
    """Raw swings; the ratio is not to profit from that."""
    found = by_name(
        Results(
            dry=False,
            tflops=800,
            throughputs=[batch("raw", 50), batch("ours", 180), batch("raw", 60)],
            first_tokens=[
                FirstTokens("turbomind", "raw", "idle", [0.04]),
                FirstTokens("turbomind", "ours", "idle", [0.05]),
                FirstTokens("turbomind", "raw", "idle", [0.03]),
            ],
        )
    )
    ratio = found["448 px: vlmq / raw"]
    assert ratio.value == pytest.approx(3.0)
    assert ratio.passed
    added = found["first token p50: added by vlmq"]
    assert added.value == pytest.approx(20)
    assert added.passed is False
    assert found["448 px: share of the bf16 ceiling"].value == pytest.approx(42, abs=2)


def test_a_dry_run_says_so_in_every_line_and_meets_no_aim() -> None:
    """The echo engine's speed is nobody's aim."""
    results = Results(
        dry=True,
        throughputs=[batch("ours", 900), batch("ours", 10, "12mp")],
        faults=[Figure("kill", "lost", 0, "")],
    )
    found = figures(results, None)
    assert found
    assert all(figure.benchmark.startswith("dry run, echo") for figure in found)
    assert all(figure.passed is None for figure in found)


# --- what can be asked for ---


def test_a_change_is_for_all_backends_or_for_one() -> None:
    """Values are JSON, or text."""
    changes = ["node.batch_processes=5", "pytorch:serve.replicas=2", "serve.options.log_level=INFO"]
    turbomind, pytorch = (setup_of(name, ["0", "1"], changes) for name in ("turbomind", "pytorch"))
    assert turbomind["node"]["batch_processes"] == pytorch["node"]["batch_processes"] == 5
    assert (turbomind["serve"]["replicas"], pytorch["serve"]["replicas"]) == (2, 4)
    assert turbomind["serve"]["options"] == {"backend": "turbomind", "log_level": "INFO"}
    assert turbomind["serve"]["gpus"] == ["0", "1"]


@pytest.mark.parametrize("change", ["replicas=2", "serve.replicas", "="])
def test_a_change_that_cannot_be_read_is_named(change: str) -> None:
    """Before anything is started."""
    with pytest.raises(ConfigurationError, match=f"--set {change}"):
        setup_of("turbomind", [], [change])


def test_sizes_are_set_by_name() -> None:
    """A row's, or the number of chats."""
    scale = DRY.with_sizes(["1080p.ours=7", "chats=3"])
    assert (scale.rows["1080p"].ours, scale.chats) == (7, 3)
    assert scale.rows["448"] == DRY.rows["448"]


@pytest.mark.parametrize("size", ["1080p.ours=x", "2160p.ours=1", "1080p.mine=1", "talks=1", "448"])
def test_a_size_that_does_not_exist_is_named(size: str) -> None:
    """With what may be written instead."""
    with pytest.raises(ConfigurationError, match=f"--size {size}"):
        DRY.with_sizes([size])


def test_the_budget_ends_whatever_runs() -> None:
    """Once; what is done on the way out is not disturbed."""
    cleaned = False
    with pytest.raises(BudgetSpent), bounded(Clock(0.2)):
        try:
            time.sleep(30)
        finally:
            time.sleep(0.05)
            cleaned = True
    assert cleaned
