"""What programs are told to compute on."""

from __future__ import annotations

import pytest

from workers import devices


def test_on_gpus_a_program_sees_those_and_computes_as_it_likes() -> None:
    """Given two GPUs, then only they are named."""
    assert devices.environment("1,GPU-5") == {"CUDA_VISIBLE_DEVICES": "1,GPU-5"}


def test_on_the_processor_no_gpu_is_seen_and_threads_wait_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given no policy of the operator's, then the waiting of one program takes no core of another."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert devices.environment("") == {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}


def test_an_operators_own_policy_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given one in the environment, then it holds."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert devices.on_processor() == {"OMP_WAIT_POLICY": "active"}
