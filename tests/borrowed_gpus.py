"""GPUs borrowed for tests as a trainer borrows them: by a process that can be killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from workers.training.gpulocks import free_file

_PROGRAM = """
import sys, time
from pathlib import Path
from workers.training.gpulocks import GpuLocks, LentGpus
run_dir, job, *gpus = sys.argv[1:]
lent = GpuLocks(Path(run_dir), gpus, served=lambda: gpus).take(len(gpus), job)
assert isinstance(lent, LentGpus), lent
print("taken", flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def borrowed(run_dir: Path, *gpus: str, job: str) -> Iterator[subprocess.Popen[str]]:
    """Hold the locks of these GPUs during a block; the process may be killed in it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(run_dir), job, *gpus],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "taken\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def freed_for(run_dir: Path, gpu: str) -> str | None:
    """For whom the fleet says that no engine is left on a GPU; None if it does not."""
    try:
        return free_file(run_dir, gpu).read_text().strip()
    except FileNotFoundError:
        return None
