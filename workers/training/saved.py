"""Checkpoints of a trainer on disk, and which of them are whole. Needs no model library.

DeepSpeed writes a folder of several files, and ``last_checkpoint`` knows nothing of a crash half
way. So the trainer's own hook writes a seal into the folder when everything in it is on the disk:
a folder without a seal, or one whose files are not those of the seal, is no checkpoint.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from shared.storage import storage_errors, sync_folder, write_json

SEAL = "sealed.json"
_NAME = re.compile(r"iter_(\d+)\.pth")


class Seal(msgspec.Struct, frozen=True):
    """``sealed.json``: what a whole checkpoint holds. ``files`` are names with sizes in bytes."""

    iteration: int
    step: int
    """Optimizer steps done."""
    created_at: int
    files: dict[str, int]
    loss: float | None = None


class SavedCheckpoint(msgspec.Struct, frozen=True):
    """A whole checkpoint."""

    path: Path
    iteration: int
    step: int
    created_at: int
    size_bytes: int
    loss: float | None = None


def checkpoint_name(iteration: int) -> str:
    """The folder of a checkpoint, named as mmengine does."""
    return f"iter_{iteration}.pth"


def seal(folder: Path, *, iteration: int, step: int, created_at: int, loss: float | None) -> None:
    """Say that a checkpoint is whole, after making everything in it durable.

    Raises: StorageFull, StorageFailed.
    """
    files: dict[str, int] = {}
    with storage_errors(folder):
        for path in sorted(folder.iterdir()):
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                files[path.name] = os.fstat(stream.fileno()).st_size
        sync_folder(folder)
    write_json(folder / SEAL, Seal(iteration, step, created_at, files, loss))
    sync_folder(folder.parent)


def checkpoint_at(folder: Path) -> SavedCheckpoint | None:
    """The checkpoint in ``folder`` if it is whole."""
    try:
        mark = msgspec.json.decode((folder / SEAL).read_bytes(), type=Seal)
        sizes = {name: (folder / name).stat().st_size for name in mark.files}
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    if sizes != mark.files or not sizes:
        return None
    return SavedCheckpoint(
        folder, mark.iteration, mark.step, mark.created_at, sum(sizes.values()), mark.loss
    )


def checkpoints(work_dir: Path) -> list[SavedCheckpoint]:
    """The whole checkpoints of a work folder, oldest first; none if there is no such folder."""
    if not work_dir.is_dir():
        return []
    folders = [path for path in work_dir.iterdir() if _NAME.fullmatch(path.name)]
    found = [checkpoint for path in folders if (checkpoint := checkpoint_at(path))]
    return sorted(found, key=lambda checkpoint: checkpoint.iteration)


def newest(work_dirs: list[Path]) -> SavedCheckpoint | None:
    """The whole checkpoint that is furthest, among those of all attempts at a job."""
    found = [one for work_dir in work_dirs for one in checkpoints(work_dir)]
    return max(found, key=lambda one: (one.iteration, one.created_at), default=None)
