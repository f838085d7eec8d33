"""The real driver's answers. Needs a GPU."""

from __future__ import annotations

import pynvml
import pytest

from workers.gpus import GpuWatch


def has_driver() -> bool:
    """Whether NVML answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_driver(), reason="no NVIDIA driver")]


def test_the_driver_tells_of_each_gpu() -> None:
    """Memory in bytes, utilisation as a share; all within what can be."""
    watch = GpuWatch()
    found = watch.sample()
    assert found
    assert watch.latest() == found
    assert [gpu.index for gpu in found] == list(range(len(found)))
    for gpu in found:
        assert 0 <= gpu.memory_used_bytes <= gpu.memory_total_bytes
        assert gpu.memory_total_bytes > 1 << 30
        assert gpu.utilisation is None or 0 <= gpu.utilisation <= 1


def test_the_driver_can_be_asked_again_and_again() -> None:
    """Each sample opens and closes it."""
    watch = GpuWatch()
    assert all(watch.sample() for _ in range(20))
