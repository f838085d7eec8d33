"""Real image files in batches: prepared in the consumers, counted by the engine."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.faults.batches import line, results, submit, wait_until_ended
from tests.running_node import RunningNode, running_node

SLOW_START = {"setup_delay_s": 3, "faults": True}
IMAGE_TOKENS = 256
"""What the echo engine counts for an image."""


def jpeg(number: int, size: tuple[int, int] = (160, 120)) -> bytes:
    """A picture of its own colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number * 7 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def shown(custom_id: str, *urls: str) -> str:
    """A line that shows images and asks about them."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"say {custom_id}"}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return line(custom_id, content)  # type: ignore[arg-type]


def data_url(data: bytes) -> str:
    """The bytes as a URL."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def padded_png(size: int) -> bytes:
    """A tiny picture in a file that is made large by a chunk that nobody reads."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    picture = stream.getvalue()
    chunk = b"prIv" + bytes(size)
    padding = struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return picture[:33] + padding + picture[33:]


def test_images_in_flight_take_bounded_memory() -> None:
    """One upload, named by every line of a small file, must not fill the machine's memory."""
    slow = {"model": "echo", "engine": "echo", "max_running": 8, "options": {"delay_s": 0.3}}
    with running_node(models=(slow,), node={"batch_processes": 1}) as own:
        sdk = own.sdk(max_retries=0)
        upload = sdk.files.create(file=("a.png", padded_png(6 << 20)), purpose="vision").id
        lines = [shown(f"item-{number}", upload) for number in range(200)]
        batch = wait_until_ended(sdk, submit(sdk, lines).id, 90)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 200
        [child] = own.batch_children()
        rows = Path(f"/proc/{child}/status").read_text().splitlines()
        status = dict(row.split(":", 1) for row in rows)
        assert int(status["VmHWM"].split()[0]) < 1200 * 1024


def test_each_line_is_answered_with_its_images(sdk: openai.OpenAI) -> None:
    """300 files in two chunks: uploads and data URLs, one to three per line."""
    uploaded = [
        sdk.files.create(file=(f"{number}.jpg", jpeg(number)), purpose="vision").id
        for number in range(5)
    ]
    urls = {
        f"item-{number}": [
            uploaded[number % 5] if (number + place) % 2 else data_url(jpeg(number))
            for place in range(1 + number % 3)
        ]
        for number in range(300)
    }
    batch = submit(sdk, [shown(custom_id, *found) for custom_id, found in urls.items()])
    ended = wait_until_ended(sdk, batch.id)
    assert ended.error_file_id is None
    rows = results(sdk, ended.output_file_id)
    assert [row["custom_id"] for row in rows] == list(urls)
    for row in rows:
        body = row["response"]["body"]
        assert body["choices"][0]["message"]["content"] == f"say {row['custom_id']}"
        images = len(urls[row["custom_id"]])
        assert body["usage"]["prompt_tokens"] == images * IMAGE_TOKENS + 2
    assert ended.usage is not None
    assert ended.usage.input_tokens == sum(len(u) * IMAGE_TOKENS + 2 for u in urls.values())


def test_a_request_with_too_many_images_is_refused(sdk: openai.OpenAI, node: RunningNode) -> None:
    """Alone; the one with exactly the limit is answered."""
    limit = node.settings.images.max_per_request
    url = data_url(jpeg(1, (8, 8)))
    batch = submit(sdk, [shown("most", *[url] * limit), shown("more", *[url] * (limit + 1))])
    ended = wait_until_ended(sdk, batch.id)
    assert [row["custom_id"] for row in results(sdk, ended.output_file_id)] == ["most"]
    [row] = results(sdk, ended.error_file_id)
    assert row["response"]["body"]["error"]["param"] == "messages"


def test_photographs_go_through(sdk: openai.OpenAI) -> None:
    """Twelve megapixels each, more bytes than one group of prompts holds."""
    stream = io.BytesIO()
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(stream, "JPEG", quality=60)
    file = sdk.files.create(file=("photo.jpg", stream.getvalue()), purpose="vision")
    batch = submit(sdk, [shown(f"item-{number}", file.id) for number in range(6)])
    ended = wait_until_ended(sdk, batch.id)
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (6, 0)


def test_an_uploaded_image_that_is_deleted_fails_its_lines_only(sdk: openai.OpenAI) -> None:
    """What is not there any more is said to be missing."""
    gone = sdk.files.create(file=("x.jpg", jpeg(1)), purpose="vision")
    sdk.files.delete(gone.id)
    batch = submit(sdk, [shown("gone", gone.id), shown("kept", data_url(jpeg(2)))])
    ended = wait_until_ended(sdk, batch.id)
    assert [row["custom_id"] for row in results(sdk, ended.output_file_id)] == ["kept"]
    [row] = results(sdk, ended.error_file_id)
    assert row["response"]["body"]["error"]["code"] == "image_not_found"
    assert ended.completed_at is not None
    assert ended.completed_at <= time.time()


# --- when time runs out -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_port() -> Iterator[int]:
    """A server that takes a twentieth of a second for each picture."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.05)
            body = jpeg(3, (8, 8))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def hasty_sdk() -> Iterator[openai.OpenAI]:
    """The SDK, pointed at a node that gives a request two seconds in an engine."""
    with running_node(
        api={"request_timeout_s": 2},
        images={"allow_private_hosts": ["localhost"]},
        node={"engine_restart_s": 0.05},
    ) as node:
        yield node.sdk(max_retries=0)


def test_slow_images_are_no_hanging_engine(hasty_sdk: openai.OpenAI, slow_port: int) -> None:
    """The time of an engine counts from when it was asked."""
    url = f"http://localhost:{slow_port}/x.jpg"
    batch = submit(hasty_sdk, [shown(f"item-{number}", url) for number in range(70)])
    ended = wait_until_ended(hasty_sdk, batch.id)
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (70, 0)


def test_an_engine_that_starts_for_longer_than_a_request_may_take_lets_none_time_out() -> None:
    """Nobody has the items meanwhile, so none of them hangs."""
    with running_node(
        api={"request_timeout_s": 2},
        node={"engine_restart_s": 0.05},
        models=({"model": "echo", "engine": "echo", "options": SLOW_START},),
    ) as node:
        sdk = node.sdk(max_retries=0)
        ended = wait_until_ended(sdk, submit(sdk, [line("a", "[[echo:kill]]"), line("b", "b")]).id)
        [failed] = results(sdk, ended.error_file_id)
        assert failed["custom_id"] == "a"
        assert failed["response"]["body"]["error"]["code"] == "engine_crashed"
        assert [row["custom_id"] for row in results(sdk, ended.output_file_id)] == ["b"]


@pytest.mark.parametrize("neighbour", ["say b", "[[echo:kill]]"])
def test_what_hangs_in_the_engine_times_out(hasty_sdk: openai.OpenAI, neighbour: str) -> None:
    """Alone, and also while the engine's killer is looked for among its neighbours."""
    lines = [line("a", "[[echo:hang]]"), line("b", neighbour), line("c", "say c")]
    ended = wait_until_ended(hasty_sdk, submit(hasty_sdk, lines).id)
    failed = {
        row["custom_id"]: row["response"]["body"]["error"]["code"]
        for row in results(hasty_sdk, ended.error_file_id)
    }
    is_killer = "kill" in neighbour
    assert failed == {"a": "timeout"} | ({"b": "engine_crashed"} if is_killer else {})
    answered = [row["custom_id"] for row in results(hasty_sdk, ended.output_file_id)]
    assert answered == (["c"] if is_killer else ["b", "c"])
