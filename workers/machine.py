"""What this machine has to place engines on: cores, and the memory of its GPUs by NVML."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml

from shared.log import get_logger
from workers.placement import Machine

log = get_logger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin")


def look_at_machine(gpus: Iterable[str]) -> Machine:
    """The cores this process may use, and the total memory of those GPUs that can be asked."""
    gpu_bytes: dict[str, int] = {}
    wanted = list(dict.fromkeys(gpus))
    try:
        if not wanted:
            return Machine(_cores(), gpu_bytes)
        with _nvml():
            for gpu in wanted:
                gpu_bytes[gpu] = _total_bytes(gpu)
    except pynvml.NVMLError as error:
        log.warning("gpu_memory_unknown", gpus=wanted, reason=str(error))
    return Machine(_cores(), gpu_bytes)


def weight_bytes(checkpoint: str | None) -> int | None:
    """The size of a checkpoint's weights on disk; None without a folder or without weights."""
    if checkpoint is None:
        return None
    for pattern in _WEIGHTS:
        # The same weights in two formats are loaded once.
        total = sum(path.stat().st_size for path in Path(checkpoint).glob(pattern))
        if total:
            return total
    return None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _total_bytes(gpu: str) -> int:
    """``gpu`` is an index or a UUID, as CUDA_VISIBLE_DEVICES takes them."""
    if gpu.isdigit():
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
    else:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu)
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
