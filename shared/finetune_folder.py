"""The folder of one fine-tune, ``finetunes/ID/``: the truth that Redis can be restored from.

``job.json`` says what was asked and is written last of what a creation writes. Each holder of the
job has files of its own, named by its fencing token: ``states/TOKEN.json``, the whole record, and
``events/TOKEN.jsonl``. So a worker that was paused past its lease overwrites nothing; the highest
token's file counts. Whoever holds nothing (the API, the reaper) writes each event as a file.
``wanted.json`` and ``cancel.json`` are the owner's wishes; a cancellation is never taken back.
``served/STEP.json`` are the checkpoints that shall be converted, or have been.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import StorageFailed
from shared.finetunes import EventLevel, EventType, FinetuneSpec, Wanted
from shared.storage import (
    read_json,
    storage_errors,
    sync_folder,
    write_all,
    write_bytes,
    write_json,
)


class StoredEvent(msgspec.Struct, frozen=True):
    """An event as it is kept. The same ``key`` again is the same event."""

    key: str
    at_ms: int
    level: EventLevel
    type: EventType
    message: str
    data: dict[str, Any] = {}


class Wish(msgspec.Struct, frozen=True):
    """What the owner wants, since when (Unix seconds)."""

    wanted: Wanted
    at: int


class Conversion(msgspec.Struct, frozen=True):
    """A checkpoint that shall be served: asked for, then served as ``model`` or given up."""

    step: int
    requested_at: int
    model: str | None = None
    error: str | None = None


class FinetuneFolder:
    """Reads and writes one folder. Every method may raise StorageFailed, writing also StorageFull."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- what was asked, and wished since ---

    def create(self, spec: FinetuneSpec, event: StoredEvent) -> None:
        """Make the folder with the job's first event."""
        with storage_errors(self.path):
            for name in ("", "states", "events", "served"):
                (self.path / name).mkdir(mode=0o700)
        self.write_event(event)
        write_json(self.path / "job.json", spec)

    def exists(self) -> bool:
        """Whether the job was created; ``job.json`` is what makes it exist."""
        return (self.path / "job.json").exists()

    def spec(self) -> FinetuneSpec | None:
        """What was asked for; ``None`` if the creation was never finished."""
        value = read_json(self.path / "job.json")
        return None if value is None else msgspec.convert(value, FinetuneSpec)

    def write_wish(self, wish: Wish) -> None:
        """Record what the owner wants from now on."""
        name = "cancel.json" if wish.wanted == "cancel" else "wanted.json"
        write_json(self.path / name, wish)

    def withdraw_cancel(self) -> None:
        """The job had ended before it could be cancelled."""
        with storage_errors(self.path):
            (self.path / "cancel.json").unlink(missing_ok=True)

    def wish(self) -> Wish | None:
        """What the owner wants, if that was ever said."""
        for name in ("cancel.json", "wanted.json"):
            value = read_json(self.path / name)
            if value is not None:
                return msgspec.convert(value, Wish)
        return None

    # --- what its holders say ---

    def read_state(self, token: int) -> dict[str, Any] | None:
        """The record as the holder with this token left it."""
        value = read_json(self._state(token))
        if value is not None and not isinstance(value, dict):
            raise StorageFailed(f"{self._state(token)} is damaged: it holds no record")
        return value

    def write_state(self, token: int, record: dict[str, Any]) -> None:
        """Leave the record under the holder's token."""
        write_json(self._state(token), record)

    def latest_token(self, *, below: int | None = None) -> int:
        """The highest token of which there is a record; 0 if there is none."""
        tokens = self._tokens()
        return max((token for token in tokens if below is None or token < below), default=0)

    def prune_states(self, token: int) -> None:
        """Forget records of holders before ``token``, but for the last one."""
        kept = self.latest_token(below=token)
        for old in self._tokens():
            if old < kept:
                self._state(old).unlink(missing_ok=True)

    def _tokens(self) -> list[int]:
        return [int(path.stem) for path in (self.path / "states").glob("[0-9]*.json")]

    def _state(self, token: int) -> Path:
        return self.path / "states" / f"{token:010}.json"

    # --- what happened ---

    def write_event(self, event: StoredEvent) -> None:
        """Keep an event of somebody who holds nothing."""
        name = f"{event.at_ms:013}-{secrets.token_hex(4)}.json"
        write_bytes(self.path / "events" / name, msgspec.json.encode(event) + b"\n")

    def append_events(self, token: int, events: Sequence[StoredEvent]) -> int:
        """Keep a holder's events; answers how long its file was before, in bytes."""
        path = self._events(token)
        lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
        with storage_errors(path):
            is_new = not path.exists()
            with open(path, "ab", buffering=0) as stream:
                os.chmod(path, 0o600)
                before = stream.tell()
                try:
                    write_all(stream, lines)
                except OSError:
                    stream.truncate(before)  # a full disk took half a line
                    raise
                os.fsync(stream.fileno())
            if is_new:
                sync_folder(path.parent)
        return before

    def truncate_events(self, token: int, length: int) -> None:
        """Take back what a holder appended after it had lost its lease."""
        with storage_errors(self.path):
            os.truncate(self._events(token), length)

    def events_of(self, token: int) -> list[StoredEvent]:
        """The events of one holder, in its order."""
        path = self._events(token)
        if not path.exists():
            return []
        return [event for event in _parse(path) if isinstance(event, StoredEvent)]

    def events(self) -> tuple[list[StoredEvent], list[str]]:
        """Everything that happened, oldest first, each event once; and what could not be read."""
        found: list[tuple[int, StoredEvent]] = []
        damaged: list[str] = []
        for path in self._event_files():
            told_ms = 0
            for event in _parse(path):
                if isinstance(event, str):
                    damaged.append(event)
                    continue
                told_ms = max(told_ms, event.at_ms)  # a holder's own order is kept
                found.append((told_ms, event))
        found.sort(key=lambda row: row[0])
        firsts = {event.key: event for _, event in reversed(found)}
        return list(firsts.values())[::-1], damaged

    def _event_files(self) -> Iterable[Path]:
        return sorted(
            path
            for path in (self.path / "events").iterdir()
            if not path.name.startswith(".") and path.suffix in {".json", ".jsonl"}
        )

    def _events(self, token: int) -> Path:
        return self.path / "events" / f"{token:010}.jsonl"

    # --- checkpoints that shall be served ---

    def write_conversion(self, conversion: Conversion) -> None:
        """Record how far a checkpoint's conversion is."""
        write_json(self.path / "served" / f"{conversion.step}.json", conversion)

    def remove_conversion(self, step: int) -> None:
        """Take back that a checkpoint was asked for."""
        path = self.path / "served" / f"{step}.json"
        with storage_errors(path):
            path.unlink(missing_ok=True)

    def conversions(self) -> list[Conversion]:
        """All checkpoints that were asked for, by step."""
        paths = (self.path / "served").glob("[0-9]*.json")
        found = [msgspec.convert(read_json(path), Conversion) for path in paths]
        return sorted(found, key=lambda conversion: conversion.step)


def _parse(path: Path) -> Iterator[StoredEvent | str]:
    """The events of a file, and for each damaged line what is wrong with it.

    A last line that was cut off by a kill never counted.
    """
    with storage_errors(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            yield msgspec.json.decode(line, type=StoredEvent)
        except msgspec.MsgspecError as error:
            yield f"line {number} of {path} is damaged: {error}"
