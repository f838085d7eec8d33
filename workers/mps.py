"""NVIDIA's Multi-Process Service: engine processes on one GPU compute at the same time.

Without it the processes of one GPU have it by turns, each alone for its slice of time. With it
their kernels share the processors of the GPU, which pays where several replicas have kernels too
small to fill it. The service is a control program, which this machine's node runs like any other of
its programs, and a server that the control program starts when the first engine comes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from shared.errors import ConfigurationError
from shared.settings import Settings

CONTROL = "nvidia-cuda-mps-control"


def command() -> tuple[str, ...]:
    """The control program, staying in the foreground.

    Raises: ConfigurationError saying what to do without it.
    """
    program = shutil.which(CONTROL)
    if program is None:
        raise ConfigurationError(
            f"node.mps: there is no program {CONTROL} on PATH; it comes with NVIDIA's driver. "
            "Install it, or set node.mps to false"
        )
    return (program, "-f")


def environment(settings: Settings) -> Mapping[str, str]:
    """By what the control program and the engines find each other; nothing without ``node.mps``."""
    if not settings.node.mps:
        return {}
    return {
        "CUDA_MPS_PIPE_DIRECTORY": str(_pipes(settings)),
        "CUDA_MPS_LOG_DIRECTORY": str(settings.run_dir / "mps-log"),
    }


def prepare(settings: Settings) -> None:
    """Make its folders, without what a killed predecessor left."""
    shutil.rmtree(_pipes(settings), ignore_errors=True)
    for folder in environment(settings).values():
        Path(folder).mkdir(mode=0o700, exist_ok=True)


def is_up(settings: Settings) -> bool:
    """Whether engines can reach it."""
    return (_pipes(settings) / "control").exists()


def _pipes(settings: Settings) -> Path:
    return settings.run_dir / "mps"
