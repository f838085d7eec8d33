"""What this machine has to place engines on: cores, and the memory of its GPUs by NVML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml

from shared.checkpoints import weights_bytes
from shared.errors import CheckpointInvalid
from shared.log import get_logger
from shared.process import usable_cores
from workers.placement import Machine

log = get_logger(__name__)


def look_at_machine(gpus: Iterable[str]) -> Machine:
    """The cores this process may use, and the total memory of those GPUs that can be asked."""
    gpu_bytes: dict[str, int] = {}
    wanted = list(dict.fromkeys(gpus))
    try:
        if not wanted:
            return Machine(usable_cores(), gpu_bytes)
        with _nvml():
            for gpu in wanted:
                gpu_bytes[gpu] = _total_bytes(gpu)
    except pynvml.NVMLError as error:
        log.warning("gpu_memory_unknown", gpus=wanted, reason=str(error))
    return Machine(usable_cores(), gpu_bytes)


def weight_bytes(checkpoint: str | None) -> int | None:
    """The size of a checkpoint's weights; None without a folder or without whole weights."""
    if checkpoint is None:
        return None
    try:
        return weights_bytes(Path(checkpoint))
    except CheckpointInvalid as error:
        # The engine that loads it will refuse it, and says so where people look.
        log.warning("weights_unknown", folder=checkpoint, reason=error.message)
        return None


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
