"""Asking for GPUs, with the driver's answers made up at NVML's own functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest

from shared.presence import GpuReport
from workers import gpus
from workers.gpus import GpuWatch

GIB = 1 << 30


class Driver:
    """Three GPUs: one busy, one split into instances, one fallen off its bus."""

    def __init__(self) -> None:
        self.open = 0

    def init(self) -> None:
        """nvmlInit."""
        self.open += 1

    def shut_down(self) -> None:
        """nvmlShutdown."""
        self.open -= 1

    def memory(self, handle: int) -> SimpleNamespace:
        """nvmlDeviceGetMemoryInfo."""
        if handle == 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(used=handle * GIB, total=80 * GIB)

    def utilisation(self, handle: int) -> SimpleNamespace:
        """nvmlDeviceGetUtilizationRates."""
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=75, memory=10)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """In place of the library's."""
    found = Driver()
    functions: dict[str, Callable[..., object]] = {
        "nvmlInit": found.init,
        "nvmlShutdown": found.shut_down,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": found.memory,
        "nvmlDeviceGetUtilizationRates": found.utilisation,
    }
    for name, function in functions.items():
        monkeypatch.setattr(pynvml, name, function)
    return found


def test_each_gpu_is_reported_as_far_as_it_answers(driver: Driver) -> None:
    """One that is lost does not hide the others, and the driver is let go."""
    watch = GpuWatch()
    watch.sample()
    assert watch.latest() == [
        GpuReport(0, 0, 80 * GIB, 0.75),
        GpuReport(1, GIB, 80 * GIB, None),
    ]
    assert driver.open == 0


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED]
)
def test_without_a_driver_there_are_no_gpus(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no error."""

    def fail() -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    watch = GpuWatch()
    assert watch.sample() is None
    assert watch.latest() == []


def test_a_driver_that_breaks_is_let_go(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no old sample is told."""
    watch = GpuWatch()
    watch.sample()

    def fail() -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", fail)
    assert watch.sample() is None
    assert watch.latest() == []
    assert driver.open == 0


def test_a_sample_is_not_told_for_ever(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hangs must not look like one that idles."""
    watch = GpuWatch()
    watch.sample()
    now = time.monotonic()
    monkeypatch.setattr(gpus.time, "monotonic", lambda: now + gpus.STALE_S + 1)
    assert watch.latest() == []


def test_the_thread_samples_by_itself(driver: Driver) -> None:
    """As soon as it is started."""
    watch = GpuWatch()
    watch.start()
    deadline = time.monotonic() + 10
    while not watch.latest():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(watch.latest()) == 2
