"""Which names were there before, among any number, in memory that does not grow with them.

A table of hashes of 64 bits in a scratch file. Two names of one hash count as the same, which costs
nothing: the later one gets a number that it would not have needed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.storage import storage_errors

_SLOT = 8
_FIRST_SLOTS = 1 << 16
_GROWTH = 4
_BLOCK_SLOTS = 1 << 13


class SeenNames:
    """A set of names that can only grow; a context manager. Raises: StorageFull, StorageFailed."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0
        self._slots = _FIRST_SLOTS
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = self._new_table(self._slots)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def unique(self, name: str, number: int) -> str:
        """The name, or if it was there before, the name with a number that makes it new."""
        candidate = name
        while not self.add(candidate):
            candidate, number = f"{name}#{number}", number + 1
        return candidate

    def add(self, name: str) -> bool:
        """Note a name; says whether it is new."""
        digest = hashlib.blake2b(name.encode(), digest_size=_SLOT).digest()
        with storage_errors(self._scratch):
            is_new = self._put(self._descriptor, self._slots, digest)
            if is_new:
                self._count += 1
                if self._count * 2 > self._slots:
                    self._grow()
        return is_new

    @staticmethod
    def _put(descriptor: int, slots: int, digest: bytes) -> bool:
        at = int.from_bytes(digest, "little") % slots
        while (found := os.pread(descriptor, _SLOT, at * _SLOT)) != _EMPTY:
            if found == digest:
                return False
            at = (at + 1) % slots
        os.pwrite(descriptor, digest, at * _SLOT)
        return True

    def _grow(self) -> None:
        slots = self._slots * _GROWTH
        larger = self._new_table(slots)
        for start in range(0, self._slots, _BLOCK_SLOTS):
            block = os.pread(self._descriptor, _BLOCK_SLOTS * _SLOT, start * _SLOT)
            for at in range(0, len(block), _SLOT):
                digest = block[at : at + _SLOT]
                if digest != _EMPTY:
                    self._put(larger, slots, digest)
        os.close(self._descriptor)
        self._descriptor, self._slots = larger, slots

    def _new_table(self, slots: int) -> int:
        path = self._scratch / f"seen-{os.urandom(8).hex()}"
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()  # it goes with its descriptor
            os.truncate(descriptor, slots * _SLOT)
        return descriptor


_EMPTY = bytes(_SLOT)
