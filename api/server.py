"""``python -m api.server --config FILE``: the API behind gunicorn's threaded worker.

Each worker process connects its own stores after the fork. SIGTERM stops accepting, lets requests
in progress end for as long as consumers drain, then exits.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from flask import Flask
from gunicorn import glogging, util
from gunicorn.app.base import BaseApplication
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine, ParseException
from gunicorn.workers.gthread import ThreadWorker

from api.app import create_app
from api.auth import is_loopback
from api.connection import bound_stalls, cut_short
from shared import log, statuses
from shared.connection import server_of
from shared.errors import ConfigurationError, VlmqError
from shared.keys import KeyStore
from shared.process import die_with_parent
from shared.settings import Settings, load_settings
from shared.storage import Layout, write_bytes
from shared.stores import Stores

CUT_SHORT_S = 2
"""How long before the end of the drain chat answers in progress are ended."""
_REASONS = {400: "Bad Request", 414: "URI Too Long", 431: "Request Header Fields Too Large"}
_log = log.get_logger(__name__)


def check_exposure(settings: Settings, keys: KeyStore) -> None:
    """Refuse to be open to the network without API keys. Raises: ConfigurationError."""
    host = settings.api.host
    if not is_loopback(host) and not keys.required():
        raise ConfigurationError(
            f"refusing to listen on {host} without API keys: anybody who reaches it could use it. "
            "Make a key with 'vlmq keys create', or listen on 127.0.0.1"
        )


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn, configured from our settings instead of its own files."""

    def __init__(self, settings: Settings, *, port_file: Path | None = None) -> None:
        self._settings = settings
        self._port_file = port_file
        self._stores: Stores | None = None
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's options."""
        for name, value in self._options().items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Build the application; gunicorn calls this in each worker process."""
        self._stores = Stores.connect(self._settings)
        return create_app(self._stores)

    def _options(self) -> dict[str, Any]:
        api = self._settings.api
        host = f"[{api.host}]" if ":" in api.host else api.host
        return {
            "bind": f"{host}:{api.port}",
            "workers": api.processes,
            "threads": api.threads,
            "worker_class": Worker,
            "worker_connections": max(1000, 2 * api.threads),
            "keepalive": 15,
            "timeout": 60,
            "graceful_timeout": max(2 * CUT_SHORT_S, math.ceil(self._settings.queue.drain_s)),
            "logger_class": Logger,
            "loglevel": self._settings.log_level.lower(),
            "control_socket_disable": True,
            "when_ready": self._when_ready,
            "post_fork": self._post_fork,
            "worker_exit": self._worker_exit,
        }

    def _when_ready(self, arbiter: Any) -> None:
        for listener in arbiter.LISTENERS:
            bound_stalls(listener.sock)
        port = arbiter.LISTENERS[0].sock.getsockname()[1]
        keys = KeyStore(Layout(self._settings.data_dir).keys).required()
        _log.info(
            "api_listening",
            url=f"http://{self._options()['bind'].rpartition(':')[0]}:{port}/v1",
            keys="required: send 'Authorization: Bearer <key>'"
            if keys
            else "not required; only this machine can connect. 'vlmq keys create' makes one",
        )
        if self._port_file is not None:
            write_bytes(self._port_file, f"{port}\n".encode())

    def _post_fork(self, arbiter: Any, worker: Any) -> None:
        # gunicorn's own look for a new parent comes late, and then waits for open answers.
        die_with_parent(worker.ppid)

    def _worker_exit(self, arbiter: Any, worker: Any) -> None:
        if self._stores is not None:
            self._stores.close()


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's threaded worker, which stops listening at once and complains in JSON."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On SIGTERM stop listening; gunicorn's own worker first answers what it has.

        A client that comes meanwhile is refused, and tries the next server, instead of being left
        in a queue that nobody will ever look at. Answers that are still being made when the time
        is nearly up are cut short, or their engines would go on for nobody.
        """
        super().handle_exit(sig, frame)
        self.method_queue.defer(self._stop_listening)
        timer = threading.Timer(self.cfg.graceful_timeout - CUT_SHORT_S, cut_short)
        timer.daemon = True
        timer.start()

    def _stop_listening(self) -> None:
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer a request that never became one: too long, or not HTTP."""
        status = 414 if isinstance(exc, LimitRequestLine) else 400
        status = 431 if isinstance(exc, LimitRequestHeaders) else status
        if not isinstance(exc, ParseException) or status not in _REASONS:
            super().handle_error(req, client, addr, exc)
            return
        code = _REASONS[status].lower().replace(" ", "_")
        body = msgspec.json.encode(
            statuses.body_of(status, message=str(exc)[:200], param=None, code=code)
        )
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            util.write_nonblock(client, head.encode() + body)
        except OSError as error:
            _log.debug("client_gone", reason=str(error))


class Logger(glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's messages through our log."""

    def setup(self, cfg: Any) -> None:
        """Drop gunicorn's handlers and let the root logger's have the messages."""
        super().setup(cfg)
        self.error_log.handlers = []
        self.error_log.propagate = True
        # Its chatter about booting workers is not news.
        self.error_log.setLevel(max(logging.WARNING, self.loglevel))

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """Log a traceback, but not for a client that stalled: anybody could fill the disk so."""
        if isinstance(sys.exc_info()[1], BlockingIOError | TimeoutError):
            self.error_log.debug("client_stalled")
        else:
            super().exception(msg, *args, **kwargs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until SIGTERM. Exits with 2, and a sentence, if it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m api.server", description="The HTTP API.")
    parser.add_argument("--config", type=Path, help="TOML file with the settings")
    parser.add_argument("--port-file", type=Path, help="write the port here once listening")
    options = parser.parse_args(arguments)
    die_with_parent()
    try:
        settings = load_settings(options.config)
        log.configure("api", level=settings.log_level)
        layout = Layout(settings.data_dir)
        layout.create()
        check_exposure(settings, KeyStore(layout.keys))
        # Said here once, not as a traceback of each process.
        server_of(settings)
    except VlmqError as error:
        sys.exit(_complain(error))
    Server(settings, port_file=options.port_file).run()


def _complain(error: VlmqError) -> int:
    sys.stderr.write(f"vlmq api: {error.message}\n")
    return 2


if __name__ == "__main__":
    main()
