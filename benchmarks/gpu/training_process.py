"""Runs one training process tree, and tells what its scalars and files say about it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.gpu_samples import sampling

_POLL_S = 0.1
_TAIL = 2_500


class Iteration(msgspec.Struct, frozen=True):
    """One forward and backward pass over a micro-batch, as xtuner writes it."""

    step: int
    loss: float
    time: float
    """Seconds, those of waiting for data included."""
    data_time: float
    lr: float
    memory: float = 0.0
    """The most that tensors took so far, in MiB."""


class Observed(msgspec.Struct, frozen=True):
    """A training from its start to its end."""

    iterations: list[Iteration]
    startup_s: float
    """Before the first iteration began."""
    wall_s: float
    checkpoint_s: float
    """From the last iteration to the whole checkpoint."""
    checkpoint_bytes: int
    used_gib: float | None
    """The most that nvidia-smi showed, on the fullest GPU."""


def train(
    command: Sequence[str],
    work: Path,
    log: Path,
    *,
    environment: dict[str, str],
    gpus: Sequence[str],
    limit_s: float,
) -> Observed:
    """Run a training to its end.

    Raises: AssertionError with the end of its log if it failed, TimeoutError.
    """
    began, first_line_at = time.time(), 0.0
    with sampling(gpus) as samples, running(command, log, environment, gpus) as process:
        while process.poll() is None:
            if time.time() - began > limit_s:
                raise TimeoutError(f"training took longer than {limit_s:.0f} s: {tail(log)}")
            if not first_line_at and iterations(work):
                first_line_at = time.time()
            time.sleep(_POLL_S)
    ended = time.time()
    assert process.returncode == 0, f"exit status {process.returncode}: {tail(log)}"
    found = iterations(work)
    assert found, f"training ended without an iteration: {tail(log)}"
    checkpoint_s, checkpoint_bytes = _checkpoint(work)
    return Observed(
        iterations=found,
        startup_s=(first_line_at or ended) - began - found[0].time,
        wall_s=ended - began,
        checkpoint_s=checkpoint_s,
        checkpoint_bytes=checkpoint_bytes,
        used_gib=round(max(memory for _, memory, _ in samples) / 1024, 1) if samples else None,
    )


@contextmanager
def running(
    command: Sequence[str], log: Path, environment: dict[str, str], gpus: Sequence[str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process group with its own log that does not outlive the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def iterations(work: Path) -> list[Iteration]:
    """What xtuner has written of its progress; a line that is still being written is left out."""
    lines: list[Any] = []
    for file in sorted(work.glob("*/vis_data/scalars.json")):
        whole, _, _ = file.read_bytes().rpartition(b"\n")
        lines += [msgspec.json.decode(line) for line in whole.splitlines() if line.strip()]
    return [msgspec.convert(line, Iteration) for line in lines if "loss" in line]


def last_checkpoint(work: Path) -> Path:
    """The newest whole checkpoint.

    Raises: AssertionError if there is none.
    """
    mark = work / "last_checkpoint"
    assert mark.exists(), f"no checkpoint was saved in {work}"
    return Path(mark.read_text().strip())


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-_TAIL:]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def size_of(path: Path) -> int:
    """Bytes of a file, or of everything below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _checkpoint(work: Path) -> tuple[float, int]:
    """Seconds and bytes of the last checkpoint; both are written after the last scalars."""
    scalars = max(work.glob("*/vis_data/scalars.json"))
    mark = work / "last_checkpoint"
    if not mark.exists():
        return 0.0, 0
    seconds = mark.stat().st_mtime - scalars.stat().st_mtime
    return max(0.0, seconds), size_of(last_checkpoint(work))
