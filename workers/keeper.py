"""Keeps a lease alive while its holder works, and tells the holder when to stop.

One thread per process renews the lease in hand. While Redis is away it keeps trying and the work
goes on: whether the lease was lost is decided by its token when the work is committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from shared.errors import BatchCancelled, BatchExpired, LeaseLost, QueueUnavailable, VlmqError
from shared.jobs import StopReason
from shared.leases import Lease, Leases
from shared.log import get_logger

log = get_logger(__name__)

_RETRY_S = 1.0
_ASK_AGAIN_S = 0.5

T = TypeVar("T")


class Keeper:
    """Renews one lease at a time."""

    def __init__(self, leases: Leases, *, renew_s: float) -> None:
        self._leases = leases
        self._renew_s = renew_s
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._lost = False
        self._stop_reason: StopReason | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Renew ``lease`` until the block ends."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
            self._thread.start()
        with self._lock:
            self._lease, self._lost, self._stop_reason = lease, False, None
        try:
            yield
        finally:
            with self._lock:
                self._lease = None

    def check(self) -> None:
        """Return if the work should go on.

        Raises: LeaseLost, BatchCancelled or BatchExpired.
        """
        if self._lost:
            raise LeaseLost()
        if self._stop_reason is not None:
            raise stop_error(self._stop_reason)

    def _run(self) -> None:
        pause_s = self._renew_s
        while True:
            time.sleep(pause_s)
            with self._lock:
                lease = self._lease
            pause_s = self._renew_s if lease is None or self._renew(lease) else _RETRY_S

    def _renew(self, lease: Lease) -> bool:
        """Renew once; false if Redis did not answer."""
        try:
            reason = self._leases.renew(lease)
        except QueueUnavailable:
            log.warning("lease_not_renewed", batch_id=lease.batch_id, unit=lease.unit)
            return False
        except LeaseLost:
            with self._lock:
                self._lost = self._lost or self._lease is lease
            return True
        except Exception:
            # Whatever it was, the next try may do better, and without any the lease is lost.
            log.exception("lease_not_renewed", batch_id=lease.batch_id, unit=lease.unit)
            return False
        with self._lock:
            if self._lease is lease:
                self._stop_reason = reason
        return True


def until_answered(call: Callable[[], T], keep_going: Callable[[], None]) -> T:
    """Do ``call`` again until Redis answers; what it reports is on disk already.

    ``keep_going`` is called between tries and may raise to stop.
    """
    while True:
        try:
            return call()
        except QueueUnavailable:
            keep_going()
            time.sleep(_ASK_AGAIN_S)


def stop_error(reason: StopReason) -> VlmqError:
    """The error that stands for a request to stop."""
    return BatchCancelled() if reason == "cancelled" else BatchExpired()
