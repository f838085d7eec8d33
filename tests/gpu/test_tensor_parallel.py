"""One model over two GPUs answers as on one. Needs two GPUs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.conftest import has_gpu
from tests.gpu.asking import about, completed, file_of, picture
from tests.gpu.walking_model import write_walking
from workers.inference.engines.base import EngineSpec
from workers.inference.engines.lmdeploy_engine import LmdeployEngine


def count_gpus() -> int:
    """How many GPUs this process sees."""
    if not has_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(240),
    pytest.mark.skipif(count_gpus() < 2, reason="fewer than two GPUs"),
]


@pytest.mark.parametrize("backend", ["turbomind", "pytorch"])
def test_two_gpus_answer_as_one(tmp_path: Path, backend: str) -> None:
    """Given a model whose answers no rounding changes, then they are the same."""
    if backend == "pytorch":
        pytest.importorskip("ray", reason="lmdeploy spreads its PyTorch engine with ray")
    write_walking(tmp_path)
    assert answers(tmp_path, backend, tp=2) == answers(tmp_path, backend, tp=1)


def answers(model: Path, backend: str, *, tp: int) -> dict[int, str]:
    """What a text and several pictures are answered with, by prompt."""
    options = {"backend": backend, "tp": tp, "cache_max_entry_count": 0.1}
    engine = LmdeployEngine(EngineSpec("m", path=str(model), session_len=4096, options=options))
    prompts = [
        about(prompt_id=0),
        *(about(file_of(picture(seed)), prompt_id=seed) for seed in range(1, 5)),
    ]

    async def scenario() -> dict[int, str]:
        await engine.setup()
        try:
            return {number: one.text for number, one in (await completed(engine, prompts)).items()}
        finally:
            await engine.close()

    return asyncio.run(scenario())
