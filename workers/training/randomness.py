"""The state of all random numbers beside a checkpoint: dropout goes on where it stopped.

mmengine and DeepSpeed save weights, optimizer and schedules, not this.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank


def save(folder: Path) -> None:
    """Write this process's state into a checkpoint's folder."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - xtuner draws from the global one
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, _path(folder))


def restore(folder: Path) -> None:
    """Go on from the state in a checkpoint; one saved by another number of processes has none."""
    if not _path(folder).is_file():
        return
    state = torch.load(_path(folder), weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _path(folder: Path) -> Path:
    return folder / f"random_{get_rank()}.pt"
