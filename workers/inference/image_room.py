"""A bound on the image bytes that the requests of one process hold together.

Many small requests may each name large images; without this a few clients could take all memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import RateLimited


class ImageRoom:
    """Lets requests read images while those read before hold less than ``max_bytes``.

    At most ``readers`` read at a time, so what is held exceeds the bound by no more than their
    requests' own limits.
    """

    def __init__(self, max_bytes: int, *, readers: int) -> None:
        self._max_bytes = max_bytes
        self._readers = readers
        self._held_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def reading(self, deadline: float) -> Iterator[None]:
        """Wait for room (until ``deadline``, in Unix seconds), then read. Raises: RateLimited."""
        with self._changed:
            while self._readers == 0 or self._held_bytes >= self._max_bytes:
                if not self._changed.wait(timeout=deadline - time.time()):
                    raise RateLimited("too many large images are being worked on; try again")
            self._readers -= 1
        try:
            yield
        finally:
            with self._changed:
                self._readers += 1
                self._changed.notify_all()

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        """Count the images of a request for as long as it holds them."""
        with self._changed:
            self._held_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= size_bytes
                self._changed.notify_all()
