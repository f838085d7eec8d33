"""What programs are told to compute on."""

from __future__ import annotations

import pytest

from workers import devices


@pytest.fixture(autouse=True)
def _undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this very process was told."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def test_on_gpus_a_program_sees_those_and_computes_as_it_likes() -> None:
    """Given two GPUs, then only they are named."""
    assert devices.environment("1,GPU-5") == {"CUDA_VISIBLE_DEVICES": "1,GPU-5"}


def test_on_the_processor_no_gpu_is_seen_and_threads_do_not_wait_busily() -> None:
    """Given no GPU, then the waiting of one program takes no core of another for long."""
    assert devices.environment("") == {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": "5000"}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_an_operator_decided_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Given either in the environment, which programs inherit, then nothing is added."""
    monkeypatch.setenv(name, "passive")
    assert devices.on_processor() == {}
