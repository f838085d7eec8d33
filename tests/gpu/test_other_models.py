"""Vision-language models other than InternVL2, small and with random weights. Needs a GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared.errors import ImageTruncated
from tests.contract.conftest import has_gpu
from tests.gpu.asking import about, completed, file_of, picture
from tests.gpu.other_models import WRITERS
from workers.inference.engines.base import EngineSpec, Image
from workers.inference.engines.lmdeploy_engine import LmdeployEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not has_gpu(), reason="no GPU"),
]


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        ("qwen2-vl", "turbomind"),
        ("qwen2-vl", "pytorch"),
        ("internvl3", "pytorch"),
    ],
)
def test_pictures_reach_the_model(tmp_path: Path, model: str, backend: str) -> None:
    """Text and pictures are answered, a picture changes the answer, half of one is refused."""
    WRITERS[model](tmp_path)
    engine = LmdeployEngine(
        EngineSpec(
            model,
            path=str(tmp_path),
            session_len=4096,
            options={"backend": backend, "cache_max_entry_count": 0.1},
        )
    )
    whole = file_of(picture(3), "JPEG")
    half = Image(whole.data[: len(whole.data) // 2])
    prompts = [
        about(prompt_id=0),
        *(about(file_of(picture(seed)), prompt_id=seed) for seed in range(1, 9)),
        about(file_of(picture(1)), prompt_id=9),
        about(half, prompt_id=10),
    ]

    async def scenario() -> dict[int, object]:
        await engine.setup()
        try:
            return dict(await completed(engine, prompts))
        finally:
            await engine.close()

    answers = asyncio.run(scenario())
    assert isinstance(answers.pop(10), ImageTruncated)
    # TurboMind counts an end token that comes in the last place, or does not, by model.
    assert {answer.completion_tokens for answer in answers.values()} <= {11, 12}
    assert answers[1].prompt_tokens > answers[0].prompt_tokens
    assert len({answers[seed].text for seed in range(1, 9)}) > 1, "all pictures look the same to it"
