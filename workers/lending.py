"""GPUs of this machine that are lent to training, as the node's fleet sees them.

Who takes a GPU, and the files by which the two talk, are in ``workers.training.gpulocks``. A lock
that its holder let go of, by whatever death, is a GPU given back.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import VlmqError
from shared.log import get_logger
from shared.storage import storage_errors, write_bytes
from workers.training.gpulocks import free_file, lock_file

log = get_logger(__name__)

_MAX_HOLDER_BYTES = 256
STOP_MARGIN_S = 10.0
"""How much sooner than the borrower gives up waiting engines have to be done, to be gone by then."""


@dataclass(frozen=True)
class Loan:
    """A GPU that is lent to ``holder``, a fine-tune's id.

    Engines on it are given until ``until_s`` (of ``time.monotonic``) to finish.
    """

    gpu: str
    holder: str
    until_s: float

    @property
    def reason(self) -> str:
        """Why a model is away, for people."""
        return f"GPU {self.gpu} is lent to fine-tune {self.holder}"


class Lending:
    """The loans there are. ``wait_s`` is how long the borrower waits for engines to be gone."""

    def __init__(self, run_dir: Path, *, wait_s: float) -> None:
        self._run_dir = run_dir
        self._wait_s = wait_s
        self._complained = False
        self.loans: Mapping[str, Loan] = {}

    def look(self, gpus: Iterable[str]) -> None:
        """See which of the GPUs are lent now."""
        self.loans = {gpu: loan for gpu in gpus if (loan := self._loan(gpu)) is not None}

    def tell(self, gpus: Iterable[str], used: Iterable[str]) -> None:
        """Say which lent GPUs no engine of this node uses, and take back what was said of others.

        What it says names the lock's holder, so that the next one does not take it for an answer.
        """
        engines_on = set(used)
        for gpu in gpus:
            loan = self.loans.get(gpu)
            said = None if loan is None or gpu in engines_on else loan.holder
            try:
                self._say(free_file(self._run_dir, gpu), said)
            except VlmqError as error:
                # Training waits for the file; the next turn tries again.
                if not self._complained:
                    log.error("lent_gpu_untold", gpu=gpu, reason=error.message)  # noqa: TRY400
                self._complained = True
            else:
                self._complained = False

    def _loan(self, gpu: str) -> Loan | None:
        try:
            descriptor = os.open(lock_file(self._run_dir, gpu), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("gpu_lock_unseen", gpu=gpu, reason=error.strerror)
            return self.loans.get(gpu)  # as far as is known
        try:
            holder = _signed_holder(descriptor)
        finally:
            os.close(descriptor)
        if holder is None:
            return None
        known = self.loans.get(gpu)
        if known is not None and known.holder == holder:
            return known
        give_s = max(0.0, self._wait_s - STOP_MARGIN_S)
        return Loan(gpu, holder, time.monotonic() + give_s)

    def _say(self, path: Path, text: str | None) -> None:
        with storage_errors(path):
            said = path.read_text().strip() if path.exists() else None
            if text is None and said is not None:
                path.unlink()
            elif text is not None and said != text:
                write_bytes(path, f"{text}\n".encode())


def _signed_holder(descriptor: int) -> str | None:
    """Who holds the lock and has written so; None also while somebody is merely choosing."""
    try:
        # Shared, so that lookers do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        written = os.read(descriptor, _MAX_HOLDER_BYTES).decode(errors="replace").split()
        return written[0] if written else None
    # Its holder is gone. Whoever chooses next must not be taken for it before it has signed, and
    # nobody writes while we hold the lock.
    os.truncate(descriptor, 0)
    return None
