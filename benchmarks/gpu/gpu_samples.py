"""What nvidia-smi says of the GPUs: which there are, and how full and busy they are by and by."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_INTERVAL_S = 0.5
_QUERY = "utilization.gpu,memory.used,power.draw"


def gpu_names() -> list[str]:
    """The GPUs that nvidia-smi lists; none without it."""
    try:
        listed = _ask("--query-gpu=name")
    except OSError:
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


def memory_bytes() -> int:
    """Memory of the smallest GPU; 0 without one."""
    try:
        listed = _ask("--query-gpu=memory.total")
    except OSError:
        return 0
    return min((int(line) << 20 for line in listed.split() if line.isdigit()), default=0)


Sample = tuple[float, float, float]
"""Percent busy, MiB used, watts."""


@contextmanager
def sampling(gpus: Sequence[str]) -> Iterator[list[Sample]]:
    """Read the GPUs by and by, in a thread; the samples are complete at the end."""
    samples: list[Sample] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_INTERVAL_S):
            samples.extend(_read(gpus))

    thread = threading.Thread(target=sample, name="gpu-samples", daemon=True)
    if gpus:
        thread.start()
    try:
        yield samples
    finally:
        stop.set()
        if gpus:
            thread.join()


def _read(gpus: Sequence[str]) -> list[Sample]:
    answer = _ask(f"--query-gpu={_QUERY}", f"--id={','.join(gpus)}")
    rows = [line.split(",") for line in answer.splitlines() if line.count(",") == 2]
    return [(_number(busy), _number(memory), _number(watts)) for busy, memory, watts in rows]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return 0.0  # "[N/A]": this driver does not tell


def _ask(*query: str) -> str:
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout if answer.returncode == 0 else ""
