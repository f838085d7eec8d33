"""A batch full of mistakes through the whole path: each is told by its line, the rest completes."""

from __future__ import annotations

import base64
import http.server
import io
import json
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Batch
from PIL import Image

from tests.faults.batches import ENDPOINT, line, results, wait_until_ended
from tests.running_node import RunningNode, running_node

QUEUE = {"chunk_items": 8, "reap_s": 0.5, "max_line_bytes": 200_000}


class ImageServer(http.server.BaseHTTPRequestHandler):
    """Serves one picture and some ways of leading astray."""

    def do_GET(self) -> None:
        """Answer by path."""
        port = self.server.server_address[1]
        away = {
            "/to-private": f"http://127.0.0.2:{port}/picture.png",
            "/to-metadata": "http://169.254.169.254/latest/meta-data/",
            "/to-file": "file:///etc/passwd",
            "/loop": "/loop",
        }
        if self.path in away:
            self.send_response(302)
            self.send_header("Location", away[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = picture() if self.path == "/picture.png" else b"<html>no picture</html>"
        self.send_response(200 if self.path != "/missing" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def picture(kind: str = "PNG") -> bytes:
    """A small picture that does not compress to nothing."""
    found = Image.effect_noise((64, 48), 80).convert("RGB")
    stream = io.BytesIO()
    found.save(stream, kind)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that promises 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    )


def data_url(data: bytes) -> str:
    """The bytes as a URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def image_port() -> Iterator[int]:
    """An image server on this machine, which is a private address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ImageServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A node with small chunks that may read one folder and one private host."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "good.png").write_bytes(picture())
    (root / "passwd").symlink_to("/etc/passwd")
    images = {"roots": [str(root)], "allow_private_hosts": ["localhost"], "fetch_timeout_s": 3}
    with running_node(queue=QUEUE, images=images) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def run(sdk: openai.OpenAI, lines: list[bytes], *, ending: bytes = b"\n") -> Batch:
    """Upload exactly these lines and wait for the batch of them to end."""
    content = ending.join(lines)
    uploaded = sdk.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=uploaded.id, endpoint=ENDPOINT, completion_window="24h"
    )
    return wait_until_ended(sdk, batch.id, 60)


def good(custom_id: str, **body: Any) -> bytes:
    """A line that will be answered."""
    return line(custom_id, f"say {custom_id}", **body).encode()


def with_image(custom_id: str, url: str) -> bytes:
    """A line that shows an image."""
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return line(custom_id, content).encode()  # type: ignore[arg-type]


def errors_by_line(sdk: openai.OpenAI, batch: Batch) -> dict[int, dict[str, Any]]:
    """The rows of the error file by the number of the input line, which their ids end with."""
    rows = results(sdk, batch.error_file_id)
    found = {int(row["id"].rpartition("_")[2]): row for row in rows}
    assert len(found) == len(rows)
    return found


def error_of(row: dict[str, Any]) -> dict[str, Any]:
    """What went wrong, with the status that HTTP would have given."""
    assert row["error"] is None
    body: dict[str, Any] = row["response"]["body"]["error"]
    return {**body, "status": row["response"]["status_code"]}


MISTAKES: list[tuple[str, bytes, str, str | None]] = [
    ("broken json", b'{"custom_id": "m0", "method"', "invalid_json", None),
    ("no json at all", b"hello", "invalid_json", None),
    ("trailing comma", good("m2")[:-1] + b",}", "invalid_json", None),
    ("invalid UTF-8", good("m3").replace(b"say", b"\xff\xfe"), "invalid_json", None),
    ("brackets without end", b'{"custom_id": "m4", "x": ' + b"[" * 60_000, "invalid_json", None),
    ("a list", b"[1, 2]", "invalid_value", None),
    ("no custom_id", b'{"method": "POST"}', "invalid_value", "custom_id"),
    ("a number for a custom_id", good("m7").replace(b'"m7"', b"7"), "invalid_value", "custom_id"),
    ("another method", good("m8").replace(b"POST", b"GET"), "invalid_value", "method"),
    ("another url", good("m9").replace(b"chat/", b"x/"), "invalid_value", "url"),
    ("an unknown model", good("m10", model="nobody"), "model_not_found", "model"),
    ("a hot temperature", good("m11", temperature="hot"), "invalid_value", "temperature"),
    ("a float of tokens", good("m12", max_tokens=1.5), "invalid_value", "max_tokens"),
    ("tools", good("m13", tools=[]), "unsupported_parameter", "tools"),
    ("a stream", good("m14", stream=True), "invalid_value", "stream"),
    ("no messages", good("m15", messages=[]), "invalid_value", "messages"),
    ("a used custom_id", good("good-0"), "duplicate_custom_id", "custom_id"),
    ("an over-long line", b'{"custom_id": "' + b"x" * 300_000 + b'"}', "body_too_large", None),
]  # fmt: skip


def test_every_mistake_is_told_by_its_line_and_the_rest_completes(sdk: openai.OpenAI) -> None:
    """In the error file and in the batch's errors, with line numbers as an editor counts."""
    lines: list[bytes] = []
    expected: dict[int, tuple[str, str, str | None]] = {}
    for number, (name, text, code, param) in enumerate(MISTAKES):
        lines += [good(f"good-{number}"), b""]
        lines.append(text)
        expected[len(lines)] = (name, code, param)
    batch = run(sdk, lines)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (
        2 * len(MISTAKES),
        len(MISTAKES),
        len(MISTAKES),
    )
    answered = Counter(row["custom_id"] for row in results(sdk, batch.output_file_id))
    assert answered == Counter(f"good-{number}" for number in range(len(MISTAKES)))
    failed = errors_by_line(sdk, batch)
    assert failed.keys() == expected.keys()
    assert batch.errors is not None
    assert batch.errors.data is not None
    told = {problem.line: problem for problem in batch.errors.data}
    assert told.keys() == expected.keys()
    for number, (name, code, param) in expected.items():
        error = error_of(failed[number])
        assert (error["code"], error["param"]) == (code, param), name
        assert error["status"] == {"body_too_large": 413, "model_not_found": 404}.get(code, 400), (
            name
        )
        assert (told[number].code, told[number].param) == (code, param), name
        assert told[number].message == error["message"] != "", name


def test_windows_line_endings_and_a_byte_order_mark_are_no_mistakes(sdk: openai.OpenAI) -> None:
    """The file may come from any editor, and need not end with a newline."""
    lines = [b"\xef\xbb\xbf" + good("a"), good("b"), b"", good("c")]
    batch = run(sdk, lines, ending=b"\r\n")
    assert batch.error_file_id is None
    rows = results(sdk, batch.output_file_id)
    assert [row["custom_id"] for row in rows] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("lines", "code", "at", "param"),
    [
        ([b""], "empty_file", None, None),
        ([b"", b"hello", b"world"], "invalid_json", 2, None),
        ([b"{", good("a", model="nobody")], "model_not_found", 2, "model"),
    ],
)
def test_a_file_without_anything_to_run_fails(
    sdk: openai.OpenAI, lines: list[bytes], code: str, at: int | None, param: str | None
) -> None:
    """At once, as a whole."""
    content = b"\n".join(lines) or b"\n"
    batch = run(sdk, [content])
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.errors is not None
    assert batch.errors.data is not None
    [problem] = batch.errors.data
    assert (problem.code, problem.line, problem.param) == (code, at, param)


def test_every_bad_image_is_told_by_its_code_and_the_rest_completes(
    sdk: openai.OpenAI, node: RunningNode, image_port: int
) -> None:
    """Broken, fake, huge, forbidden, missing; the good ones beside them are captioned."""
    whole = picture()
    root = node.settings.images.roots[0]
    vision = sdk.files.create(file=("p.png", whole), purpose="vision")
    bad_upload = sdk.files.create(file=("p.png", whole[: len(whole) // 2]), purpose="vision")
    local = f"http://localhost:{image_port}"
    cases = {
        "truncated png": (data_url(whole[:-40]), "image_truncated"),
        "truncated jpeg": (data_url(picture("JPEG")[:-200]), "image_truncated"),
        "truncated upload": (bad_upload.id, "image_truncated"),
        "a text": (data_url(b"I am no image"), "image_unreadable"),
        "html": (data_url(b"<html></html>"), "image_unreadable"),
        "no bytes": (data_url(b""), "image_unreadable"),
        "bad base64": ("data:image/png;base64,@@@@", "image_unreadable"),
        "50,000 x 50,000": (data_url(bomb()), "image_too_large"),
        "passwd": ("file:///etc/passwd", "image_forbidden"),
        "passwd path": ("/etc/passwd", "image_forbidden"),
        "climbing": (f"{root}/../../../../../../etc/passwd", "image_forbidden"),
        "link to passwd": (f"{root}/passwd", "image_forbidden"),
        "no such path": (f"{root}/none.png", "image_not_found"),
        "no such upload": ("file-0123456789", "image_not_found"),
        "private": (f"http://127.0.0.1:{image_port}/picture.png", "image_forbidden"),
        "private by name": ("http://0x7f000001/x.png", "image_forbidden"),
        "metadata": ("http://169.254.169.254/latest/", "image_forbidden"),
        "v6 loopback": ("http://[::1]/x.png", "image_forbidden"),
        "to private": (f"{local}/to-private", "image_forbidden"),
        "to metadata": (f"{local}/to-metadata", "image_forbidden"),
        "to file": (f"{local}/to-file", "image_download_failed"),
        "loop": (f"{local}/loop", "image_download_failed"),
        "not found": (f"{local}/missing", "image_not_found"),
        "web page": (f"{local}/page", "image_unreadable"),
        "ftp": ("ftp://localhost/x.png", "image_forbidden"),
    }
    fine = {
        "data": data_url(whole),
        "upload": vision.id,
        "path": f"{root}/good.png",
        "file url": f"file://{root}/good.png",
        "http": f"{local}/picture.png",
    }
    lines = [with_image(name, url) for name, (url, _) in cases.items()]
    for number, (name, url) in enumerate(fine.items()):
        lines.insert(number * 5, with_image(name, url))
    batch = run(sdk, lines)
    assert batch.status == "completed"
    answered = [row["custom_id"] for row in results(sdk, batch.output_file_id)]
    assert sorted(answered) == sorted(fine)
    failed = results(sdk, batch.error_file_id)
    assert sorted(row["custom_id"] for row in failed) == sorted(cases)
    for row in failed:
        error = error_of(row)
        assert (error["code"], error["status"]) == (cases[row["custom_id"]][1], 400), row
        assert error["param"] == "messages[0].content[1].image_url.url"
        assert "root:" not in json.dumps(row)
    assert batch.errors is None, "a bad image is an answer of its request, not of the file"


def test_anothers_upload_is_not_an_image(node: RunningNode) -> None:
    """The consumer reads for the batch's owner only."""
    stores = node.stores
    with stores.files.begin(owner="somebody", filename="p.png", purpose="vision") as writer:
        writer.write(picture())
        theirs = writer.commit()
    sdk = node.sdk(max_retries=0)
    batch = run(sdk, [with_image("theirs", theirs.id), good("fine")])
    [row] = results(sdk, batch.error_file_id)
    assert error_of(row)["code"] == "image_not_found"
