"""The server itself: who may use it, what it survives, how it starts and stops."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from shared.keys import KeyStore
from shared.models import ModelRegistry
from shared.storage import Layout, write_json
from tests.integration.api_server import ApiServer, StartApi

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'
CONFLICTING_LENGTHS = (
    b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
)


@pytest.fixture(scope="module")
def keyed(start_api: StartApi) -> Iterator[ApiServer]:
    """A server with a key for each of two owners, listening to the network."""
    with start_api(owners=("ann", "bob"), host="0.0.0.0") as server:
        yield server


# --- keys and owners ---


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic YTpi", "Bearer \xff"]
)
def test_without_a_valid_key_nothing_is_answered(
    keyed: ApiServer, authorization: str | None
) -> None:
    """401 in the SDK's terms, for every address, whether or not it exists."""
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    for path in ("/models", "/files", "/batches/batch_1", "/nowhere"):
        answer = httpx.get(f"{keyed.base_url}{path}", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        keyed.client("vlmq-wrong").models.list()


def test_an_owner_sees_nothing_of_another(keyed: ApiServer) -> None:
    """Not in lists, not by id, not as an input, not as a page's start."""
    ann, bob = keyed.client(keyed.secrets["ann"]), keyed.client(keyed.secrets["bob"])
    file_id = ann.files.create(file=("in.jsonl", LINE), purpose="batch").id
    batch_id = ann.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id
    assert list(bob.files.list()) == []
    assert list(bob.batches.list()) == []
    for probe in (
        lambda: bob.files.retrieve(file_id),
        lambda: bob.files.content(file_id),
        lambda: bob.files.delete(file_id),
        lambda: bob.batches.retrieve(batch_id),
        lambda: bob.batches.cancel(batch_id),
        lambda: bob.get(f"/batches/{batch_id}/results", cast_to=object),
        lambda: bob.get(f"/batches/{batch_id}/rows", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError):
            probe()
    with pytest.raises(openai.BadRequestError) as refused:
        bob.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    assert refused.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError):
        bob.files.list(after=file_id)
    assert ann.batches.retrieve(batch_id).status == "validating"


def test_idempotency_keys_of_two_owners_do_not_meet(keyed: ApiServer) -> None:
    """The same key from another owner is another key."""
    headers = {"Idempotency-Key": "shared"}
    made = {
        keyed.client(secret)
        .files.create(file=("a", b"x"), purpose="batch", extra_headers=headers)
        .id
        for secret in keyed.secrets.values()
    }
    assert len(made) == 2


def test_a_revoked_key_stops_working_at_once(keyed: ApiServer) -> None:
    """No restart is needed."""
    keys = KeyStore(Layout(keyed.settings.data_dir).keys)
    record, secret = keys.create("eve")
    assert keyed.client(secret).models.list().data == []
    keys.revoke(record.id)
    with pytest.raises(openai.AuthenticationError):
        keyed.client(secret).models.list()


def test_a_model_of_one_owner_is_invisible_to_others(keyed: ApiServer) -> None:
    """Neither listed nor found by its name."""
    layout = Layout(keyed.settings.data_dir)
    models = ModelRegistry(layout)
    models.link("org/everyones", None, engine="echo")
    record = models.link("ft:tiny:anns:1", None, engine="echo")
    path = layout.models / "ft%3Atiny%3Aanns%3A1.json"
    write_json(path, msgspec.structs.replace(record, visible_to="ann"))
    time.sleep(1.1)  # lookups by name may be a second old
    ann, bob = keyed.client(keyed.secrets["ann"]), keyed.client(keyed.secrets["bob"])
    assert {model.id for model in ann.models.list()} == {"ft:tiny:anns:1", "org/everyones"}
    assert {model.id for model in bob.models.list()} == {"org/everyones"}
    assert ann.models.retrieve("ft:tiny:anns:1").owned_by == "vlmq"
    with pytest.raises(openai.NotFoundError) as missing:
        bob.models.retrieve("ft:tiny:anns:1")
    assert missing.value.code == "model_not_found"
    assert ann.models.retrieve("org/everyones").object == "model"
    with pytest.raises(openai.PermissionDeniedError):
        ann.models.delete("org/everyones")


# --- without keys ---


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example:8000"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:8000", "Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://[no-address"}, 403),
        ({"Host": "localhost:8000", "X-Forwarded-For": "10.0.0.9"}, 401),
        ({"Host": "localhost:8000", "Forwarded": "for=10.0.0.9"}, 401),
    ],
)
def test_without_keys_a_browser_cannot_be_turned_against_the_server(
    api: ApiServer, headers: dict[str, str], status: int
) -> None:
    """Re-pointed domains, other sites' pages and proxies are refused; this machine is served."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    answer = api.request(f"GET /v1/models HTTP/1.1\r\n{lines}\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_without_keys_it_refuses_to_listen_to_the_network(tmp_path: Path) -> None:
    """The message says what to do about it."""
    config = tmp_path / "node.toml"
    config.write_text(
        f'[storage]\ndata_dir = "{tmp_path / "data"}"\n[api]\nhost = "0.0.0.0"\nport = 0\n'
        f'[redis]\nurl = "unix://{tmp_path / "none.sock"}"\n'
    )
    command = [sys.executable, "-m", "api.server", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "vlmq keys create" in ended.stderr


def test_with_keys_it_says_where_it_listens_and_that_keys_are_required(keyed: ApiServer) -> None:
    """The start leaves both in the log."""
    started = next(
        line
        for line in map(json.loads, keyed.log.read_text().splitlines())
        if line["event"] == "api_listening"
    )
    assert started["url"] == f"http://0.0.0.0:{keyed.port}/v1"
    assert started["keys"].startswith("required")


# --- the shape of every answer ---


def test_every_answer_has_a_request_id(api: ApiServer, sdk: openai.OpenAI) -> None:
    """The client's own if it is harmless, else a new one; errors carry it too."""
    ours = httpx.get(f"{api.base_url}/models", headers={"x-request-id": "trace-1:a.b"})
    assert ours.headers["x-request-id"] == "trace-1:a.b"
    for unfit in ("x" * 200, "a b", "-x", 'a"b'):
        answer = httpx.get(f"{api.base_url}/models", headers={"x-request-id": unfit})
        assert answer.headers["x-request-id"].startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.files.retrieve("file-00")
    assert (missing.value.request_id or "").startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "//v1//models", 404, "not_found"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("DELETE", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models?page=2", 400, "unsupported_parameter"),
        ("GET", "/v1/files?purpose=fun", 400, "invalid_value"),
        ("GET", "/v1/files?order=up", 400, "invalid_value"),
        ("GET", "/v1/files?limit=10001", 400, "invalid_value"),
        ("GET", "/v1/files?limit=1&limit=2", 400, "invalid_value"),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", 404, "not_found"),
        ("GET", "/v1/files/%00/content", 404, "not_found"),
        ("GET", "/v1/files/%ff%fe", 404, "not_found"),
        ("GET", "/v1/files/file-../content", 404, "not_found"),
        ("GET", "/v1/models/..%2f..%2fkeys", 404, "model_not_found"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404, "not_found"),
    ],
)
def test_an_error_is_always_the_same_object(
    api: ApiServer, method: str, path: str, status: int, code: str
) -> None:
    """JSON with the four keys, whatever was asked."""
    answer = api.request(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    error = _json(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_cancel_accepts_no_body_but_an_empty_object(api: ApiServer) -> None:
    """An unknown field is named rather than ignored."""
    url = f"{api.base_url}/batches/batch_0/cancel"
    assert httpx.post(url, json={}).status_code == 404
    refused = httpx.post(url, json={"now": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "now")


# --- what it survives ---


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Big: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 500 + b"\r\n", 431),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n", 400),
        (CONFLICTING_LENGTHS, 400),
    ],
)
def test_what_is_not_http_gets_an_error_object_too(api: ApiServer, raw: bytes, status: int) -> None:
    """Even where gunicorn refuses before the application sees anything."""
    answer = api.request(raw)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert set(_json(answer)["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{api.base_url}/models").status_code == 200


def test_a_broken_chunked_body_is_refused(api: ApiServer) -> None:
    """A malformed chunk is a 400, not a crash."""
    head = (
        b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    answer = api.request(head + b"zz\r\nrubbish")
    assert answer.startswith(b"HTTP/1.1 400")
    assert _json(answer)["error"]["code"] == "invalid_request"
    assert "request_crashed" not in api.log.read_text()


def test_without_redis_requests_fail_clearly_and_work_again_afterwards(start_api: StartApi) -> None:
    """503 with ``retry-after``; alive but not ready; then back without a restart."""
    with start_api() as server:
        sdk = server.client()
        url = server.base_url.removesuffix("/v1")
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
        server.stop_redis()
        for call in (
            lambda: sdk.files.create(file=("a", b"x"), purpose="batch"),
            sdk.files.list,
            lambda: sdk.batches.retrieve("batch_0"),
        ):
            with pytest.raises(openai.InternalServerError) as failed:
                call()
            assert failed.value.status_code == 503
            assert failed.value.code == "queue_unavailable"
            assert failed.value.response.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/healthz").status_code == 200
        unready = httpx.get(f"{url}/readyz")
        assert unready.status_code == 503
        assert unready.json()["checks"] == {"redis": "queue_unavailable", "storage": "ok"}
        server.start_redis()
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert sdk.files.create(file=("a", b"x"), purpose="batch").bytes == 1


def test_readiness_says_when_the_storage_is_full(start_api: StartApi) -> None:
    """A disk without the required room makes the server unready, and uploads a clear error."""
    with start_api() as server:
        text = server.config.read_text()
        server.config.write_text(text.replace("min_free_bytes = 0", f"min_free_bytes = {2**60}"))
        assert server.stop() == 0
        server.start()
        unready = httpx.get(f"{server.base_url.removesuffix('/v1')}/readyz")
        assert unready.json()["checks"] == {"redis": "ok", "storage": "storage_full"}
        with pytest.raises(openai.InternalServerError) as full:
            server.client().files.create(file=("a", b"x"), purpose="batch")
        assert (full.value.status_code, full.value.code) == (507, "storage_full")
        assert full.value.response.headers["x-should-retry"] == "false"


def test_sigterm_lets_an_upload_end(start_api: StartApi) -> None:
    """The request in progress is answered, then the server is gone."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhello\r\n--b--\r\n'
    )
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(form)}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    with start_api() as server, server.connect() as connection:
        connection.sendall(head.encode() + form[:60])
        _wait_for(lambda: any((server.folder / "data" / "files").iterdir()))
        server.process.terminate()
        _wait_for(lambda: not _listens(server))
        connection.sendall(form[60:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert server.process.wait(timeout=30) == 0


def test_the_api_needs_no_model_libraries(tmp_path: Path) -> None:
    """Importing it leaves tensors, image decoding and the workers out of the process."""
    script = (
        "import sys, api.wsgi, api.server\n"
        "heavy = {'torch', 'PIL', 'transformers', 'lmdeploy', 'workers'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"


def _json(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _listens(server: ApiServer) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", server.port)) == 0
