"""How a consumer finds the replicas of a model and chooses between them.

Pure bookkeeping, shared by the streaming client and the batch flight: it looks at the socket
folder and at what hosts say, and opens nothing itself. Times are of ``time.monotonic``, seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from shared.errors import ConfigurationError
from workers.inference.engines.base import Tiling
from workers.inference.engines.wire import VERSION, Draining, Hello, Load

SCAN_S = 0.1
BUSY_PAUSE_S = 0.05
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 1.0

R = TypeVar("R")


class HasReplica(Protocol):
    """A connection and what is known of the host at its other end."""

    @property
    def replica(self) -> Replica[Any]:
        """The host."""
        ...


L = TypeVar("L", bound=HasReplica)


@dataclass(slots=True)
class _Attempts:
    """How connecting to one socket file went so far."""

    inode: tuple[int, int]
    failures: int = 0
    retry_at_s: float = 0.0
    open: bool = False


class SocketWatch:
    """Says which sockets of a folder to connect to now.

    A socket that refuses is tried again later and later; a new file under its name at once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._attempts: dict[Path, _Attempts] = {}

    def due(self, now_s: float) -> list[Path]:
        """The sockets that are not open and whose time has come."""
        found = self._scan()
        for path, inode in found.items():
            known = self._attempts.get(path)
            if known is None or (known.inode != inode and not known.open):
                self._attempts[path] = _Attempts(inode)
        for path, known in list(self._attempts.items()):
            if path not in found and not known.open:
                del self._attempts[path]
        return [p for p, known in self._attempts.items() if _is_due(known, now_s)]

    def opened(self, path: Path) -> None:
        """The socket is connected."""
        self._attempts[path].open = True

    def greeted(self, path: Path) -> None:
        """A host answered there; forget earlier failures."""
        self._attempts[path].failures = 0

    def closed(self, path: Path, now_s: float) -> None:
        """The connection ended or was refused."""
        known = self._attempts[path]
        known.open = False
        pause_s = _FIRST_BACKOFF_S * 2 ** min(known.failures, 10)
        known.failures += 1
        known.retry_at_s = now_s + min(pause_s, _LONGEST_BACKOFF_S)

    def _scan(self) -> dict[Path, tuple[int, int]]:
        found: dict[Path, tuple[int, int]] = {}
        try:
            for path in self._folder.glob("*.sock"):
                status = path.stat()
                found[path] = (status.st_dev, status.st_ino)
        except FileNotFoundError:
            pass  # a socket or the whole folder went away meanwhile; the next scan sees it
        return found


def _is_due(known: _Attempts, now_s: float) -> bool:
    return not known.open and now_s >= known.retry_at_s


@dataclass(slots=True, eq=False)
class Replica(Generic[R]):
    """One connected host as this client sees it; ``in_flight`` is by id on the wire."""

    hello: Hello | None = None
    load: Load = field(default_factory=lambda: Load(0, 0))
    in_flight: dict[int, R] = field(default_factory=dict)
    draining: bool = False
    paused_until_s: float = 0.0
    _others: int = 0

    def note(self, message: Hello | Load | Draining, model: str) -> None:
        """Remember what the host said.

        Raises: ConfigurationError if the host is not one this client can talk to.
        """
        match message:
            case Hello():
                _check_hello(message, model)
                self.hello = message
            case Load():
                self.load = message
                # Those of other clients: only they are news, our own we count ourselves.
                self._others = max(0, message.running + message.waiting - len(self.in_flight))
            case Draining():
                self.draining = True

    @property
    def device(self) -> str:
        """What the host computes on; empty before it has said so."""
        return self.hello.device if self.hello is not None else ""

    @property
    def ready(self) -> bool:
        """Whether the host takes prompts."""
        return self.hello is not None and not self.draining

    def room(self, now_s: float) -> int:
        """How many more prompts the host has a place for."""
        if self.hello is None or self.draining or now_s < self.paused_until_s:
            return 0
        # Other clients' prompts may be in the other lane; the host says so if there is no place.
        places = self.hello.max_running + self.hello.max_waiting
        return max(0, places - len(self.in_flight))

    @property
    def busyness(self) -> float:
        """Prompts per running slot."""
        slots = self.hello.max_running if self.hello else 1
        return (len(self.in_flight) + self._others) / slots


def _check_hello(hello: Hello, model: str) -> None:
    if hello.version != VERSION:
        raise ConfigurationError(
            f"engine process {hello.pid} speaks version {hello.version} of the protocol, "
            f"this consumer {VERSION}; restart both from one installation"
        )
    if hello.model != model:
        raise ConfigurationError(f"engine process {hello.pid} serves {hello.model}, not {model}")


def least_busy(links: Iterable[L], now_s: float) -> L | None:
    """The link whose replica has room and the least to do."""
    free = [link for link in links if link.replica.room(now_s) > 0]
    return min(free, key=lambda link: link.replica.busyness, default=None)


def shared_tiling(replicas: Iterable[Replica[Any]]) -> Tiling | None:
    """The tiling that all replicas that have greeted us agree on, or None."""
    found = {replica.hello.tiling for replica in replicas if replica.hello is not None}
    return found.pop() if len(found) == 1 else None
