"""Batch consumers that die of an item: the item is found and the rest completes.

No picture known to us kills a consumer, so one is made deadly: its server shoots whichever consumer
asks for it, in the middle of preparing that item, with a real SIGKILL.
"""

from __future__ import annotations

import http.server
import io
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.faults.batches import (
    assert_each_answered_once,
    assert_nothing_left,
    done,
    line,
    numbered,
    results,
    submit,
    wait_until_done,
    wait_until_ended,
)
from tests.running_node import RunningNode, running_node

pytestmark = pytest.mark.timeout(150)

ITEMS = 200
LIMIT_S = 60.0
QUEUE = {
    "lease_ttl_s": 6,
    "renew_s": 2,
    "reap_s": 0.3,
    "chunk_items": 32,
    "min_chunk_items": 32,
    "drain_s": 5,
}
SLOW_ECHO = {"model": "echo", "engine": "echo", "max_running": 16, "options": {"delay_s": 0.05}}


class DeadlyServer:
    """Serves pictures; ``/kill`` kills the consumer that asks for it."""

    def __init__(self) -> None:
        self.node: RunningNode | None = None
        self.kills = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/kill"):
                    outer._shoot(self.client_address[1])
                    return
                body = _picture()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()

    def _shoot(self, port: int) -> None:
        assert self.node is not None
        inode = _socket_inode(port, self._server.server_address[1])
        for pid in self.node.batch_children():
            if inode in _sockets(pid):
                os.kill(pid, signal.SIGKILL)
                self.kills += 1


def _picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    return stream.getvalue()


def _socket_inode(local_port: int, remote_port: int) -> str:
    """The inode of the client's end of a connection on this machine."""
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
        if ports == [local_port, remote_port]:
            return fields[9]
    return ""


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return {link[8:-1] for link in links if link.startswith("socket:[")}


@pytest.fixture(scope="module")
def server() -> Iterator[DeadlyServer]:
    """The server of pictures."""
    found = DeadlyServer()
    yield found
    found.close()


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the queue besides the usual ones."""
    return {}


@pytest.fixture
def node(server: DeadlyServer, settings: dict[str, Any]) -> Iterator[RunningNode]:
    """A node whose consumers may ask that server."""
    images = {"allow_private_hosts": ["localhost"]}
    queue = {**QUEUE, **settings}
    with running_node(models=(SLOW_ECHO,), queue=queue, images=images) as running:
        server.node, server.kills = running, 0
        yield running
    assert_nothing_left(running)


@pytest.fixture
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK."""
    return node.sdk(max_retries=8)


def shown(custom_id: str, url: str) -> str:
    """A line with an image."""
    content = [
        {"type": "text", "text": f"say {custom_id.removeprefix('item-')}"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return line(custom_id, content)  # type: ignore[arg-type]


def test_two_items_that_kill_their_consumer_are_found(
    server: DeadlyServer, sdk: openai.OpenAI
) -> None:
    """Each after three deaths, as worker_crashed; the other 198 are answered."""
    lines = numbered(ITEMS)
    lines[7] = shown("item-7", f"{server.url}/good.png")
    deadly = {"item-40", "item-55"}
    for custom_id in deadly:
        lines[int(custom_id.removeprefix("item-"))] = shown(custom_id, f"{server.url}/kill")
    ended = wait_until_ended(sdk, submit(sdk, lines).id, LIMIT_S)
    assert ended.status == "completed"
    answered = Counter(row["custom_id"] for row in results(sdk, ended.output_file_id))
    assert answered == Counter({f"item-{n}" for n in range(ITEMS)} - deadly)
    failed = results(sdk, ended.error_file_id)
    assert Counter(row["custom_id"] for row in failed) == Counter(deadly)
    codes = {row["response"]["body"]["error"]["code"] for row in failed}
    assert codes == {"worker_crashed"}
    assert server.kills <= 6


@pytest.mark.parametrize("settings", [{"max_chunk_attempts": 2}])
def test_a_chunk_that_keeps_killing_is_given_up(server: DeadlyServer, sdk: openai.OpenAI) -> None:
    """Retries have a cap: its lines say so, the other chunks' are answered."""
    lines = numbered(ITEMS)
    lines[40] = shown("item-40", f"{server.url}/kill")
    ended = wait_until_ended(sdk, submit(sdk, lines).id, LIMIT_S)
    assert ended.status == "completed"
    chunk = {f"item-{number}" for number in range(32, 64)}
    failed = results(sdk, ended.error_file_id)
    assert Counter(row["custom_id"] for row in failed) == Counter(chunk)
    assert {row["error"]["code"] for row in failed} == {"worker_crashed"}
    assert len(results(sdk, ended.output_file_id)) == ITEMS - 32
    assert server.kills == 2


def test_consumers_killed_again_and_again_blame_nobody(
    node: RunningNode, sdk: openai.OpenAI
) -> None:
    """Every line has its answer."""
    batch = submit(sdk, numbered(3 * ITEMS))
    for part in range(1, 5):
        wait_until_done(sdk, batch.id, part * 64)
        for pid in node.batch_children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    assert done(sdk.batches.retrieve(batch.id)) < 3 * ITEMS
    assert_each_answered_once(sdk, wait_until_ended(sdk, batch.id, LIMIT_S), 3 * ITEMS)
