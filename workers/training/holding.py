"""Keeps a fine-tune's lease alive while its holder works, and hears what its owner wants.

One thread for each lease in hand. While Redis is away it keeps trying and the work goes on: only an
answer that the token is no longer the present one ends it.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol, Self

from shared.errors import LeaseLost, QueueUnavailable, VlmqError
from shared.finetune_store import FinetuneLease, FinetuneStore
from shared.finetunes import Wanted
from shared.log import get_logger

log = get_logger(__name__)

ASK_S = 2.0
"""The longest time between two renewals, by which an owner's wish is heard."""
_RETRY_S = 1.0


class StopWanted(VlmqError):
    """The job's owner wants it to pause or to be cancelled."""

    code = "stop_wanted"

    def __init__(self, wanted: Wanted) -> None:
        super().__init__()
        self.wanted = wanted


class Draining(VlmqError):
    """The worker is stopping; its work goes to another."""

    code = "draining"


class KeepGoing(Protocol):
    """Returns if the work should go on, and raises if not."""

    def __call__(self) -> None: ...


class Holding:
    """A lease in hand, as a context: renewed until the block ends."""

    def __init__(
        self,
        store: FinetuneStore,
        lease: FinetuneLease,
        *,
        renew_s: float,
        draining: threading.Event,
    ) -> None:
        self.lease = lease
        self._store = store
        self._every_s = min(renew_s, ASK_S)
        self._draining = draining
        self._lost = False
        self._wanted: Wanted = "run"
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"holding {lease.job_id}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # One that renews a lease already given back would only be told that it is lost.
        self._thread.join(timeout=_RETRY_S)

    def check(self) -> None:
        """Return if the work should go on.

        Raises: LeaseLost, StopWanted or Draining.
        """
        if self._wanted != "run" and not self._lost:
            raise StopWanted(self._wanted)
        self.check_held()

    def check_held(self) -> None:
        """The same, whatever the owner wants. Raises: LeaseLost or Draining."""
        if self._lost:
            raise LeaseLost()
        if self._draining.is_set():
            raise Draining()

    def _run(self) -> None:
        pause_s = self._every_s
        while not self._over.wait(pause_s):
            pause_s = self._every_s if self._renew() else _RETRY_S

    def _renew(self) -> bool:
        """Renew once; false if Redis did not answer."""
        try:
            self._wanted = self._store.renew(self.lease)
        except QueueUnavailable:
            log.warning("lease_not_renewed", job_id=self.lease.job_id)
            return False
        except LeaseLost:
            self._lost = not self._over.is_set()
            return True
        except Exception:
            # Whatever it was, the next try may do better, and without any the lease is lost.
            log.exception("lease_not_renewed", job_id=self.lease.job_id)
            return False
        return True
