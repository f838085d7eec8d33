"""The manifest of an image set, which grows while the set is listed.

Every listing writes files of its own, named by its fencing token: ``TOKEN.entries.jsonl``,
``TOKEN.places.jsonl``, ``TOKEN.chunks.bin`` and, replaced whole and last, ``TOKEN.plan.json``, which
says how much of them counts. One that goes on where another ended copies that one's table of chunks
and takes its entries as they are. So a listing that was paused past its lease can go on writing
without effect, and the plan of the highest token is always whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from shared.captions import Entry, Place
from shared.errors import LeaseLost, StorageFailed
from shared.jobs import BatchProblem
from shared.manifest import (
    CHUNK_BYTES,
    Chunk,
    Manifest,
    Part,
    PartKind,
    Plan,
    latest_listing,
    pack_chunk,
    part_path,
)
from shared.storage import storage_errors, write_all, write_json

MAX_PROBLEMS = 100
_encoder = msgspec.json.Encoder()
_KINDS: tuple[PartKind, ...] = ("chunks.bin", "entries.jsonl", "places.jsonl")


class ListingWriter:
    """Appends entries to the manifest of the batch in ``folder``, under ``token``; a context manager.

    ``plan`` is what was published last, by this listing or the one that it goes on from.
    Raises: StorageFull, StorageFailed; LeaseLost if somebody with a higher token was here.
    """

    def __init__(self, folder: Path, token: int, model: str) -> None:
        self._folder = folder
        self._token = token
        self._files: dict[PartKind, BinaryIO] = {}
        self._lines: list[bytes] = []
        self._size = 0
        self._offset = 0
        """Where in the file of entries the chunk begins that is being filled."""
        self._place: Place | None = None
        self._place_offset = 0
        self._places_end = 0
        with storage_errors(folder):
            (folder / "manifest").mkdir(mode=0o700, exist_ok=True)
            latest = latest_listing(folder)
        if latest is not None and latest >= token:
            raise LeaseLost()
        self.plan = Plan(model, 0, 0, complete=False)
        if latest is not None:
            self.plan = Manifest(folder).plan
        self.sync = self.plan.sync
        """What becomes of a set that is synced; the plan has it once it is published."""
        self._before = latest
        self._has_published = False
        self._problems = list(self.plan.problems)
        self._chunks = self.plan.chunks
        self.total = self.plan.total
        """The entries so far, those of the chunk that is being filled among them."""

    def __enter__(self) -> Self:
        try:
            with storage_errors(self._folder):
                for kind in _KINDS:
                    path = part_path(self._folder, self._token, kind)
                    # Unbuffered: closing it must not be what meets the full disk.
                    self._files[kind] = open(path, "xb", buffering=0)
                    os.chmod(path, 0o600)
            if self._before is not None:
                self._copy_chunks(part_path(self._folder, self._before, "chunks.bin"))
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for kind, stream in self._files.items():
            stream.close()
            if not self._has_published:
                with suppress(OSError):  # else it takes some room until the batch goes
                    part_path(self._folder, self._token, kind).unlink()

    @property
    def chunks(self) -> int:
        """The chunks so far, published or not."""
        return self._chunks

    @property
    def problems(self) -> list[BatchProblem]:
        """What is wrong with the set as a whole."""
        return self._problems

    @property
    def filling(self) -> int:
        """The entries of the chunk that is being filled."""
        return len(self._lines)

    @property
    def filling_bytes(self) -> int:
        """The bytes of the chunk that is being filled."""
        return self._size

    def add(self, entry: Entry, place: Place) -> None:
        """Append an entry, whose ``place`` is filled in."""
        if place is not self._place:
            self._add_place(place)
        if entry.place != self._place_offset:
            entry = msgspec.structs.replace(entry, place=self._place_offset)
        line = _encoder.encode(entry)
        self._lines.append(line)
        self._size += len(line) + 1
        self.total += 1

    def note(self, problem: BatchProblem) -> None:
        """Remember something that is wrong with the set as a whole."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)

    def close_chunk(self) -> None:
        """End the chunk that is being filled, if it has entries."""
        if not self._lines:
            return
        data = b"\n".join(self._lines) + b"\n"
        items = len(self._lines)
        chunk = Chunk(self._chunks, self._offset, self._size, self.total - items + 1, items)
        self._write("entries.jsonl", data)
        self._write("chunks.bin", pack_chunk(chunk))
        self._offset += self._size
        self._chunks += 1
        self._lines, self._size = [], 0

    def publish(
        self, cursor: Any, *, complete: bool, seen: int | None = None, seen_all: bool = True
    ) -> Plan:
        """Make what was added until now durable, and the plan that counts.

        ``cursor`` is where to go on behind it; ``seen`` and ``seen_all`` are told of a sample. The
        chunk that is being filled must be closed.
        """
        assert not self._lines, "the last chunk was not closed"
        with storage_errors(self._folder):
            for stream in self._files.values():
                os.fsync(stream.fileno())
        self.plan = Plan(
            model=self.plan.model,
            chunks=self._chunks,
            total=self.total,
            complete=complete,
            parts=self._parts(),
            cursor=cursor,
            problems=self._problems,
            seen=seen,
            seen_all=seen_all,
            sync=self.sync,
        )
        write_json(part_path(self._folder, self._token, "plan.json"), self.plan)
        if not self._has_published:
            self._has_published = True
            self._forget_older()
        return self.plan

    def _forget_older(self) -> None:
        """Delete what no reader comes for: plans before the last one, and entries that never counted."""
        counting = {part.token for part in self.plan.parts}
        with storage_errors(self._folder), os.scandir(self._folder / "manifest") as entries:
            names = [entry.name for entry in entries]
        for name in names:
            digits, _, kind = name.partition(".")
            if not digits.isdigit() or int(digits) >= (self._before or 0):
                continue
            if kind in {"plan.json", "chunks.bin"} or int(digits) not in counting:
                with suppress(OSError):
                    (self._folder / "manifest" / name).unlink()

    def _parts(self) -> list[Part]:
        parts = self.plan.parts
        if parts and parts[-1].token == self._token:
            return parts
        own = Part(self._token, self.plan.chunks)
        return [*(part for part in parts if part.first_chunk < own.first_chunk), own]

    def _add_place(self, place: Place) -> None:
        line = _encoder.encode(place) + b"\n"
        self._write("places.jsonl", line)
        self._place, self._place_offset = place, self._places_end
        self._places_end += len(line)

    def _copy_chunks(self, source: Path) -> None:
        """Take over the table of the listing that this one goes on from, as far as it counts."""
        left = self.plan.chunks * CHUNK_BYTES
        with storage_errors(source), open(source, "rb") as stream:
            while left and (block := stream.read(min(left, 1 << 20))):
                self._write("chunks.bin", block)
                left -= len(block)
        if left:
            raise StorageFailed(f"{source} is shorter than its plan says")

    def _write(self, kind: PartKind, data: bytes) -> None:
        with storage_errors(self._folder):
            write_all(self._files[kind], data)


def adopt_listing(folder: Path, token: int) -> Plan:
    """Copy the plan that counts now under a higher token; whoever lists under a lower one is late.

    For when Redis was lost, and with it who listed last. Raises: StorageFull, StorageFailed.
    """
    model = Manifest(folder).plan.model
    with ListingWriter(folder, token, model) as writer:
        plan = writer.plan
        return writer.publish(
            plan.cursor, complete=plan.complete, seen=plan.seen, seen_all=plan.seen_all
        )


def problems_of(plan: Plan) -> Iterable[bytes]:
    """What is wrong with the set as a whole, as Redis keeps it."""
    return (_encoder.encode(problem) for problem in plan.problems)
