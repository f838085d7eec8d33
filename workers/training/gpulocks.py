"""GPUs lent to training: one lock file each, held by whoever may use the GPU.

In ``RUN_DIR/lent``: ``GPU.lock``, an exclusive ``flock`` held until the last process of a training
is gone, whatever ends it, with the job's id inside for people; ``GPU.free``, written by the node's
fleet when no engine is left on a locked GPU, with the same id; ``choose.lock``, held while somebody chooses. Whoever
wants several GPUs gets all of them or none, so no two ever wait for each other. Who has waited for a while
comes before all that asked later (``gpu_queue``), so that those who want few do not starve one that wants many.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.storage import storage_errors
from workers.logfiles import safe_name
from workers.training.gpu_queue import HEARD_S, PATIENCE_S, GpuQueue

_TRIES = 20
_RETRY_S = 0.05
_POLL_S = 0.2


def lent_folder(run_dir: Path) -> Path:
    """Where the locks of a machine's GPUs are."""
    return run_dir / "lent"


def lock_file(run_dir: Path, gpu: str) -> Path:
    """The lock of one GPU."""
    return lent_folder(run_dir) / f"{safe_name(gpu)}.lock"


def free_file(run_dir: Path, gpu: str) -> Path:
    """What the fleet writes when no engine is left on a locked GPU."""
    return lent_folder(run_dir) / f"{safe_name(gpu)}.free"


@dataclass(frozen=True)
class LentGpus:
    """GPUs under lock. ``locks`` are to be handed to the process that uses them, or closed."""

    gpus: tuple[str, ...]
    locks: tuple[BinaryIO, ...]
    holder: str

    @property
    def visible(self) -> str:
        """The value of CUDA_VISIBLE_DEVICES; empty hides every GPU."""
        return ",".join(self.gpus)

    def close(self) -> None:
        """Let go of the locks, unless another process holds them too."""
        for lock in self.locks:
            lock.close()


@dataclass(frozen=True)
class Taken:
    """GPUs could not be had; ``holders`` says by whom each taken one is held.

    With ``ahead`` nobody looked: free ones are kept for that job, which has waited longer.
    """

    holders: dict[str, str]
    ahead: str | None = None

    @property
    def words(self) -> str:
        """For people."""
        if self.ahead is not None:
            return f"{self.ahead}, which has waited longer, comes first"
        return ", ".join(f"GPU {gpu} is used by {job}" for gpu, job in self.holders.items())


class GpuLocks:
    """The GPUs of this machine that fine-tunes may take.

    ``served`` are those that this node's engines use; they are chosen last and waited for. For
    ``patience_s`` and ``heard_s`` see ``gpu_queue``.
    """

    def __init__(
        self,
        run_dir: Path,
        gpus: Sequence[str],
        *,
        served: Callable[[], Collection[str]],
        patience_s: float = PATIENCE_S,
        heard_s: float = HEARD_S,
    ) -> None:
        self._run_dir = run_dir
        self._queue = GpuQueue(lent_folder(run_dir), patience_s=patience_s, heard_s=heard_s)
        self._gpus = tuple(gpus)
        self._served = served

    def take(self, count: int, job_id: str) -> LentGpus | Taken:
        """Lock ``count`` GPUs, or none; whoever got none is to ask again every few seconds.

        Raises: StorageFull, StorageFailed.
        """
        if count == 0:
            return LentGpus((), (), job_id)
        served = self._served()
        with storage_errors(lent_folder(self._run_dir)):
            lent_folder(self._run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._choosing():
                ahead = self._queue.ahead_of(job_id)
                if ahead is not None:
                    found: LentGpus | Taken = Taken({}, ahead)
                else:
                    found = self._choose(count, job_id, sorted(self._gpus, key=served.__contains__))
                if isinstance(found, LentGpus):
                    self._queue.leave(job_id)
                elif count <= len(self._gpus):  # else it would keep others waiting for nothing
                    self._queue.wait(job_id)
                return found

    def wait_until_free(
        self, lent: LentGpus, *, wait_s: float, keep_going: Callable[[], None]
    ) -> list[str]:
        """Wait until no engine is left on the locked GPUs; returns those that never became free.

        ``keep_going`` may raise to stop waiting.
        """
        deadline = time.monotonic() + wait_s
        while waited_for := self._still_served(lent):
            if time.monotonic() >= deadline:
                return waited_for
            keep_going()
            time.sleep(_POLL_S)
        return []

    def holders(self) -> dict[str, str]:
        """Each locked GPU and the job that holds it."""
        found = {}
        for gpu in self._gpus:
            if not lock_file(self._run_dir, gpu).exists():
                continue  # nobody has ever taken it
            lock = _lock(lock_file(self._run_dir, gpu))
            if lock is None:
                found[gpu] = _owner(lock_file(self._run_dir, gpu))
            else:
                lock.close()
        return found

    def _still_served(self, lent: LentGpus) -> list[str]:
        served = self._served()
        return [
            gpu
            for gpu in lent.gpus
            if gpu in served and _freed_for(free_file(self._run_dir, gpu)) != lent.holder
        ]

    def _choose(self, count: int, job_id: str, candidates: Sequence[str]) -> LentGpus | Taken:
        locks: dict[str, BinaryIO] = {}
        holders: dict[str, str] = {}
        for gpu in candidates:
            lock = _lock(lock_file(self._run_dir, gpu), tries=_TRIES)
            if lock is None:
                holders[gpu] = _owner(lock_file(self._run_dir, gpu))
                continue
            locks[gpu] = lock
            if len(locks) == count:
                self._sign(locks, job_id)
                gpus = tuple(gpu for gpu in self._gpus if gpu in locks)
                return LentGpus(gpus, tuple(locks[gpu] for gpu in gpus), job_id)
        for lock in locks.values():
            lock.close()
        return Taken(holders)

    def _sign(self, locks: dict[str, BinaryIO], job_id: str) -> None:
        for gpu, lock in locks.items():
            # What the fleet said to an earlier holder is no answer to this one.
            with suppress(FileNotFoundError):
                free_file(self._run_dir, gpu).unlink()
            lock.truncate(0)
            lock.write(f"{job_id}\n".encode())
            lock.flush()

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        with open(lent_folder(self._run_dir) / "choose.lock", "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _lock(path: Path, *, tries: int = 1) -> BinaryIO | None:
    """The lock file, locked; None if somebody holds it.

    A moment's holder may be the fleet, which looks by trying: hence several ``tries``.
    """
    stream = open(path, "ab")  # noqa: SIM115 - stays open for as long as the lock is held
    for _ in range(tries):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_RETRY_S)
        else:
            return stream
    stream.close()
    return None


def _freed_for(path: Path) -> str | None:
    """Whom the fleet says a GPU is free for."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _owner(path: Path) -> str:
    return path.read_text().strip() or "somebody"
