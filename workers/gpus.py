"""How full and how busy this machine's GPUs are, asked of the NVIDIA driver by NVML.

Sampled by a thread of its own: a driver in trouble may not answer for minutes, and the node must
go on telling that it is alive. Without a driver there are no GPUs to tell of, which is no error.
"""

from __future__ import annotations

import threading
import time
from types import ModuleType

from shared.log import get_logger
from shared.presence import GpuReport

log = get_logger(__name__)

SAMPLE_S = 5.0
RETRY_S = 60.0
"""How soon a driver that was not there is looked for again."""
STALE_S = 30.0
"""A sample older than this is not told any more: the driver hangs."""


class GpuWatch:
    """Keeps the latest sample."""

    def __init__(self) -> None:
        self._latest: list[GpuReport] = []
        self._sampled_at = float("-inf")

    def start(self) -> None:
        """Sample every few seconds until the process ends."""
        threading.Thread(target=self._run, name="gpus", daemon=True).start()

    def latest(self) -> list[GpuReport]:
        """The GPUs as they were at most ``STALE_S`` ago; none if there is no driver."""
        return self._latest if time.monotonic() - self._sampled_at < STALE_S else []

    def sample(self) -> list[GpuReport] | None:
        """Ask the driver now, and keep the answer; None if there is no driver."""
        found = _ask()
        self._latest = found or []
        self._sampled_at = time.monotonic()
        return found

    def _run(self) -> None:
        while True:
            try:
                found = self.sample()
            except Exception:
                # Whatever a broken driver does, the others' samples are worth another try.
                log.exception("gpus_not_sampled")
                found = None
            time.sleep(RETRY_S if found is None else SAMPLE_S)


def _ask() -> list[GpuReport] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no_gpu_driver", reason=str(error))
        return None
    try:
        found = (_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return [gpu for gpu in found if gpu is not None]
    except pynvml.NVMLError as error:
        log.warning("gpus_not_sampled", reason=str(error))
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: ModuleType, index: int) -> GpuReport | None:
    """One GPU; None if it fails, which leaves the others alone."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as error:
        log.warning("gpu_not_sampled", gpu=index, reason=str(error))
        return None
    return GpuReport(
        index=index,
        memory_used_bytes=int(memory.used),
        memory_total_bytes=int(memory.total),
        utilisation=_utilisation(nvml, handle),
    )


def _utilisation(nvml: ModuleType, handle: object) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:
        return None  # a GPU split into instances does not tell
