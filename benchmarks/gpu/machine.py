"""The machine and the model that a run is about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True):
    """What ``prepare`` found and made."""

    gpus: list[str]
    tflops: float
    """Of one bf16 matrix product of 8192 x 8192 x 8192."""
    parameters: int
    model_s: float
    torch_version: str


class Preparing:
    """``prepare`` as a process, so that pictures can be drawn meanwhile."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.prepare", str(model)], stdout=subprocess.PIPE
        )

    def finish(self, limit_s: float) -> Machine:
        """Wait for it. Raises: AssertionError if it failed, subprocess.TimeoutExpired."""
        output, _ = self._process.communicate(timeout=limit_s)
        assert self._process.returncode == 0, "the model could not be written; see above"
        return msgspec.json.decode(output.splitlines()[-1], type=Machine)

    def close(self) -> None:
        """End it if it still runs."""
        self._process.kill()
        self._process.wait()
