"""Jobs that wait for GPUs of this machine: after a while the one that has waited longest comes first.

In ``RUN_DIR/lent``: ``JOB.waiting``, which holds when the job first asked in vain; the file's own time is
when it last did. A job asks again every few seconds, so one that did not for ``HEARD_S`` has died, was
stopped or went elsewhere: it keeps nobody waiting, and has its old place if it asks again after all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shared.storage import write_bytes
from workers.logfiles import safe_name

PATIENCE_S = 60.0
"""For so long others may take GPUs that would not be enough for a job that waits."""
HEARD_S = 60.0
"""After so long without asking a job keeps nothing for itself."""
_FORGOTTEN_S = 7 * 86_400.0
_SUFFIX = ".waiting"


class _Waiting(NamedTuple):
    """A job that waits. Both times are Unix seconds of this machine's clock."""

    since_s: float
    job: str
    """Its id, as part of a path."""
    asked_s: float


class GpuQueue:
    """The order of those that wait; whoever uses it holds ``choose.lock``."""

    def __init__(
        self, folder: Path, *, patience_s: float = PATIENCE_S, heard_s: float = HEARD_S
    ) -> None:
        self._folder = folder
        self._patience_s = patience_s
        self._heard_s = heard_s

    def ahead_of(self, job_id: str) -> str | None:
        """The job that has to get its GPUs before this one may take any. Raises: OSError."""
        now, own = time.time(), safe_name(job_id)
        waiting = sorted(self._waiting())
        mine = next(((job.since_s, job.job) for job in waiting if job.job == own), (now, own))
        for job in waiting:
            is_heard = abs(now - job.asked_s) < self._heard_s  # a clock may be set back
            is_due = now - job.since_s >= self._patience_s
            if is_heard and is_due and (job.since_s, job.job) < mine:
                return job.job
        return None

    def wait(self, job_id: str) -> None:
        """The job asked in vain. Raises: OSError, StorageFull, StorageFailed."""
        path = self._path(job_id)
        if path.exists():
            os.utime(path)
        else:
            write_bytes(path, b"%.3f\n" % time.time())

    def leave(self, job_id: str) -> None:
        """The job has its GPUs. Raises: OSError."""
        self._path(job_id).unlink(missing_ok=True)

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{safe_name(job_id)}{_SUFFIX}"

    def _waiting(self) -> Iterator[_Waiting]:
        for path in list(self._folder.glob(f"*{_SUFFIX}")):
            asked_s = path.stat().st_mtime
            if time.time() - asked_s > _FORGOTTEN_S:
                path.unlink()
                continue
            yield _Waiting(float(path.read_text()), path.name.removesuffix(_SUFFIX), asked_s)
