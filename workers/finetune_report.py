"""Which fine-tunes a machine's consumer has in hand, told to its node by a file of the machine's own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from shared.storage import write_json

_NAME = "finetunes.json"


def tell_running(run_dir: Path, jobs: Collection[str]) -> None:
    """Write the ids down. Raises: StorageFull, StorageFailed."""
    write_json(run_dir / _NAME, sorted(jobs))


def running_jobs(run_dir: Path) -> list[str]:
    """The ids that were written last; none if that cannot be read."""
    try:
        return msgspec.json.decode((run_dir / _NAME).read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError):
        return []
