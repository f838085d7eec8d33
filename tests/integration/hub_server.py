"""A hub on loopback: the part of its HTTP interface that listing and fetching a model need."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/model"


@dataclass
class FakeHub:
    """One repository, and what goes wrong with it. ``requests`` are those that came."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    status: int = 200
    """Instead of listing."""
    error_code: str | None = None
    statuses: dict[str, int] = field(default_factory=dict)
    """By file, instead of its bytes."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file: after how many bytes of the next answers the connection is closed."""
    sent: dict[str, bytes] = field(default_factory=dict)
    """By file: other bytes than those listed."""
    extra: list[dict[str, Any]] = field(default_factory=list)
    """More entries of the listing."""
    no_ranges: bool = False
    redirected: bool = False
    """Large files are elsewhere: on another host name."""
    block_pause_s: float = 0.0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def asked_for(self, name: str) -> list[str | None]:
        """The ranges with which a file's bytes were asked for."""
        return [
            headers.get("range")
            for path, headers in self.requests
            if path.endswith(f"/{name}") and "/resolve/" in path
        ]

    def entries(self) -> list[dict[str, Any]]:
        """The listing's files: large ones by sha256, others by git's digest."""
        found = []
        for name, content in self.files.items():
            blob = b"blob %d\0" % len(content) + content
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(blob, usedforsecurity=False).hexdigest(),
            }
            if name.endswith((".safetensors", ".bin")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            found.append(entry)
        return found + self.extra


@contextlib.contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer for ``hub`` during a block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append((path, headers))
            if path.startswith("/api/models/"):
                self._list(path)
            elif "/resolve/" in path or path.startswith("/cdn/"):
                self._send_file(path)
            else:
                self._answer(404, b"{}")

        def _list(self, path: str) -> None:
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if hub.status != 200:
                self._answer(hub.status, b'{"error": "no"}', hub.error_code)
            elif repo != REPO:
                self._answer(404, b'{"error": "none"}', "RepoNotFound")
            elif revision not in hub.revisions:
                self._answer(404, b'{"error": "none"}', "RevisionNotFound")
            else:
                listing = {
                    "id": REPO,
                    "sha": hub.revisions[revision],
                    "siblings": hub.entries(),
                    "tags": [],
                }
                self._answer(200, json.dumps(listing).encode())

        def _send_file(self, path: str) -> None:
            name = path.partition("/resolve/")[2].partition("/")[2] or path.removeprefix("/cdn/")
            if name in hub.statuses:
                self._answer(hub.statuses[name], b"")
                return
            if name not in hub.files:
                self._answer(404, b"", "EntryNotFound")
                return
            if hub.redirected and "/resolve/" in path and name.endswith(".safetensors"):
                port = hub.address.rpartition(":")[2]
                self.send_response(302)
                self.send_header("location", f"http://localhost:{port}/cdn/{name}")
                self.send_header("content-length", "0")
                self.end_headers()
                return
            content = hub.sent.get(name, hub.files[name])
            start = 0
            asked = self.headers.get("range")
            if asked and not hub.no_ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header(
                    "content-range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            body = content[start:]
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            cuts = hub.cuts.get(name)
            end = cuts.pop(0) if cuts else len(body)
            for place in range(0, end, 1 << 16):
                self.wfile.write(body[place : min(end, place + (1 << 16))])
                time.sleep(hub.block_pause_s)
            if end < len(body):
                self.close_connection = True

        def _answer(self, status: int, body: bytes, code: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("x-error-code", code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing; the requests are recorded."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that are killed
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
