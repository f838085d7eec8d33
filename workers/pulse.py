"""Asks every engine process how it is, and notices those that hang rather than die.

A thread with one connection to each ready engine sends a Ping each second. Silence is counted in
pings without an answer, not by the clock, so that a node that was itself suspended blames nobody.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shared.log import get_logger
from workers.inference.engines import wire

log = get_logger(__name__)

ROUND_S = 1.0
_RECV_BYTES = 64 * 1024

Target = tuple[Path, int]
"""An engine's socket and process id; a restarted one is another target."""


@dataclass
class _Patient:
    path: Path
    silent_rounds: int = 0
    busy: bool = False
    line: socket.socket | None = None
    frames: wire.Frames[wire.FromHost] = field(default_factory=wire.frames_from_host)


class Pulse:
    """What is known of the engines of this node."""

    def __init__(self, round_s: float = ROUND_S) -> None:
        self._round_s = round_s
        self._targets: frozenset[Target] = frozenset()
        self._patients: dict[Target, _Patient] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def watch(self, targets: Iterable[Target]) -> None:
        """These engines are ready; others are asked no more."""
        self._targets = frozenset(targets)

    def silent_s(self, target: Target) -> float:
        """For how long the engine has not answered, as far as it was asked."""
        patient = self._patients.get(target)
        return 0.0 if patient is None else patient.silent_rounds * self._round_s

    def busy(self, target: Target) -> bool:
        """Whether the engine had requests when it last answered."""
        patient = self._patients.get(target)
        return patient is not None and patient.busy

    def close(self) -> None:
        """Hang up."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            while not self._closing.is_set():
                self._admit(selector)
                heard = self._ask(selector)
                for target, patient in self._patients.items():
                    patient.silent_rounds = 0 if target in heard else patient.silent_rounds + 1
            for patient in self._patients.values():
                _hang_up(selector, patient)

    def _admit(self, selector: selectors.BaseSelector) -> None:
        targets = self._targets
        for target in [known for known in self._patients if known not in targets]:
            _hang_up(selector, self._patients.pop(target))
        for target in targets - self._patients.keys():
            self._patients[target] = _Patient(target[0])
        for target, patient in self._patients.items():
            if patient.line is None:
                _connect(selector, target, patient)

    def _ask(self, selector: selectors.BaseSelector) -> set[Target]:
        """One round: ping all, and return those that said anything."""
        ping = wire.encode(wire.Ping())
        for patient in self._patients.values():
            if patient.line is not None:
                try:
                    patient.line.send(ping)
                except BlockingIOError:
                    continue  # its buffer is full of pings: it will count as silent
                except OSError:
                    _hang_up(selector, patient)
        heard: set[Target] = set()
        ends_at = time.monotonic() + self._round_s
        while (left_s := ends_at - time.monotonic()) > 0 and not self._closing.is_set():
            if not selector.get_map():
                self._closing.wait(left_s)
                break
            for key, _ in selector.select(left_s):
                target: Target = key.data
                if _read(selector, self._patients[target]):
                    heard.add(target)
        return heard


def _connect(selector: selectors.BaseSelector, target: Target, patient: _Patient) -> None:
    try:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        log.warning("engine_not_asked", socket=str(patient.path), reason=str(error))
        return  # no descriptors are left; the next round tries again
    line.setblocking(False)
    try:
        line.connect(str(patient.path))
    except OSError:
        line.close()  # gone, or its queue of connections is full: silent either way
        return
    patient.line, patient.frames = line, wire.frames_from_host()
    selector.register(line, selectors.EVENT_READ, target)


def _read(selector: selectors.BaseSelector, patient: _Patient) -> bool:
    assert patient.line is not None
    try:
        data = patient.line.recv(_RECV_BYTES)
        messages = patient.frames.feed(data)
    except (OSError, wire.MalformedFrame):
        data, messages = b"", []
    if not data:
        _hang_up(selector, patient)
        return False
    for message in messages:
        if isinstance(message, wire.Load):
            patient.busy = message.running + message.waiting > 0
    return True


def _hang_up(selector: selectors.BaseSelector, patient: _Patient) -> None:
    if patient.line is not None:
        with contextlib.suppress(KeyError):
            selector.unregister(patient.line)
        patient.line.close()
        patient.line = None
