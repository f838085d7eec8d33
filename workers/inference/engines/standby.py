"""What a node and its consumers tell each other of a model whose engines are away on purpose.

Two files beside the model's sockets. ``standby`` is the node's: while it is there the engines are
unloaded, being loaded, being replaced or away because their GPU is lent (then it holds the reason), so batch consumers claim nothing for them and chat requests
have more patience. ``wanted`` is the chat consumers': its age says when a request last waited.
"""

from __future__ import annotations

import time
from pathlib import Path

from shared.storage import storage_errors, write_bytes
from workers.inference.engines.wire import replica_folder


class Standby:
    """One model's two files below ``run_dir``."""

    def __init__(self, run_dir: Path, model: str) -> None:
        folder = replica_folder(run_dir, model)
        self._flag = folder / "standby"
        self._wish = folder / "wanted"

    def begin(self, lent: str = "") -> None:
        """The engines are going away, or are not there yet; ``lent`` says why nobody may hope.

        Raises: StorageFull, StorageFailed.
        """
        with storage_errors(self._flag):
            self._flag.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._flag, lent.encode())

    def end(self) -> None:
        """An engine is ready. Raises: StorageFailed."""
        with storage_errors(self._flag):
            self._flag.unlink(missing_ok=True)

    def is_on(self) -> bool:
        """Whether the engines are away on purpose."""
        return self._flag.exists()

    def lent(self) -> str:
        """Why the engines are away for long; empty if they are not. Raises: StorageFailed."""
        with storage_errors(self._flag):
            try:
                return self._flag.read_text()
            except FileNotFoundError:
                return ""

    def want(self) -> None:
        """A request waits for the engines. Raises: StorageFailed."""
        with storage_errors(self._wish):
            self._wish.touch(mode=0o600)

    def wanted_age_s(self) -> float:
        """Seconds since a request last waited; infinite if none has."""
        try:
            return max(0.0, time.time() - self._wish.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")
