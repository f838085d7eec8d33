"""The client's end of a connection: whether it is still there, and how long it may stall.

It sees the socket through gunicorn. Under another server nothing is known of it, and only a write
that fails tells.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

from shared.errors import ModelUnavailable, RequestAborted

POLL_S = 0.5
"""How often a client's connection is looked at."""
STALL_S = 30
"""A client that neither sends the rest of its request nor reads its answer for so long is cut."""

_stopping = threading.Event()


def cut_short() -> None:
    """End every answer of this process, and any that begins, with an error to try again.

    For a server that must exit: its clients are told, and the work for them is stopped.
    """
    _stopping.set()


class Client:
    """The other end of one request's connection.

    A client that has shut down its sending side counts as gone, as in other servers. Under TLS
    nothing can be seen before it is read.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        found = environ.get("gunicorn.socket")
        plain = isinstance(found, socket.socket) and not isinstance(found, ssl.SSLSocket)
        self._socket: socket.socket | None = found if plain else None
        self._next_look = time.monotonic() + POLL_S

    def check(self) -> None:
        """Look, at most every ``POLL_S``.

        Raises: RequestAborted if the client has gone, ModelUnavailable if this server must exit.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + POLL_S
        if self._gone():
            raise RequestAborted
        if _stopping.is_set():
            raise ModelUnavailable("this server is stopping; send the request again")

    def _gone(self) -> bool:
        if self._socket is None:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def bound_download(self) -> None:
        """Cut the client off if it reads nothing for ``STALL_S`` while a file is sent to it.

        Python's ``sendfile`` waits for ever in spite of the kernel's time-out; it keeps its own.
        gunicorn takes this one off again before it reads the connection's next request.
        """
        if self._socket is not None:
            self._socket.settimeout(STALL_S)


def bound_stalls(listener: socket.socket) -> None:
    """Give every connection time-outs in the kernel; connections inherit them from the listener.

    gunicorn keeps its sockets blocking, so without this a client that stalls keeps a thread for
    ever, be it in the middle of its headers, its body or our answer.
    """
    timeval = struct.pack("ll", STALL_S, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
