"""Files over HTTP, driven by the unmodified SDK."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import httpx
import openai
import pytest

from shared.stores import Stores
from tests.integration.api_server import ApiServer, StartApi

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'


def _upload(sdk: openai.OpenAI, content: bytes = LINE, name: str = "in.jsonl") -> str:
    return sdk.files.create(file=(name, content), purpose="batch").id


def _leftovers(stores: Stores) -> list[Path]:
    whole = {path.parent for path in stores.layout.files.glob("*/file.json")}
    return [path for path in stores.layout.files.iterdir() if path not in whole]


def test_an_uploaded_file_comes_back_byte_for_byte(sdk: openai.OpenAI) -> None:
    """What went in comes out, and its object says what it is."""
    content = bytes(range(256)) * 5000 + b"\r\n--not-a-boundary\r\n"
    made = sdk.files.create(file=("photo set.bin", content), purpose="vision")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "photo set.bin", "vision")
    assert (made.object, made.status, made.expires_at) == ("file", "processed", None)
    assert sdk.files.content(made.id).read() == content
    assert sdk.files.retrieve(made.id) == made


def test_an_expiry_is_kept_with_the_file(sdk: openai.OpenAI) -> None:
    """``expires_after`` becomes ``expires_at``, counted from creation."""
    made = sdk.files.create(
        file=("in.jsonl", LINE),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert made.expires_at == made.created_at + 7200


def test_paging_visits_every_file_once(sdk: openai.OpenAI) -> None:
    """The SDK's pager sees all files, newest first, and in the other order when asked."""
    made = [
        sdk.files.create(file=(f"{number}.txt", b"x"), purpose="evals").id for number in range(7)
    ]
    newest_first = [file.id for file in sdk.files.list(purpose="evals", limit=3)]
    assert sorted(newest_first) == sorted(made)
    oldest_first = [file.id for file in sdk.files.list(purpose="evals", limit=2, order="asc")]
    assert oldest_first == newest_first[::-1]
    page = sdk.files.list(purpose="evals", limit=3)
    assert page.has_more
    assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)  # type: ignore[attr-defined]


def test_a_deleted_file_is_gone(sdk: openai.OpenAI, stores: Stores) -> None:
    """Deleting answers with the id, and leaves neither record nor bytes."""
    file_id = _upload(sdk)
    deleted = sdk.files.delete(file_id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file_id, "file", True)
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(file_id)
    assert not stores.layout.file_dir(file_id).exists()


def test_content_that_is_gone_is_not_found(sdk: openai.OpenAI, stores: Stores) -> None:
    """A file may be listed for a moment longer than it exists."""
    file = sdk.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    stores.files.content_path("local", file.id).unlink()
    with pytest.raises(openai.NotFoundError):
        sdk.files.content(file.id)
    sdk.files.delete(file.id)


def test_a_range_of_the_content_can_be_read(sdk: openai.OpenAI) -> None:
    """A client may go on with a download where it broke off."""
    file_id = _upload(sdk, b"0123456789")
    answer = sdk.files.with_raw_response.content(file_id, extra_headers={"Range": "bytes=4-6"})
    assert (answer.status_code, answer.content) == (206, b"456")


def test_content_is_an_attachment_with_a_harmless_type(sdk: openai.OpenAI) -> None:
    """Uploaded HTML must not become a page of this server."""
    made = sdk.files.create(file=("page.html", b"<script>"), purpose="user_data")
    answer = sdk.files.with_raw_response.content(made.id)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/", "upload"),
        ("..", "upload"),
        ("évil \r\nX-Injected: 1.jsonl", "évil __X-Injected: 1.jsonl"),
        ('quo"te;name.txt', 'quo"te;name.txt'),
        ("x" * 5000, "x" * 255),
    ],
)
def test_a_hostile_filename_is_made_harmless(
    api: ApiServer, sdk: openai.OpenAI, sent: str, kept: str
) -> None:
    """Neither a path nor a header can be smuggled in as a name."""
    encoded = "".join(f"%{byte:02x}" for byte in sent.encode())
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nevals\r\n'
        b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename*=UTF-8''"
        + encoded.encode()
        + b"\r\n\r\nhello\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    made = httpx.post(f"{api.base_url}/files", content=body, headers=headers).json()
    assert made["filename"] == kept
    answer = httpx.get(f"{api.base_url}/files/{made['id']}/content")
    assert answer.content == b"hello"
    assert "x-injected" not in answer.headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "fun"}, "purpose"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"purpose": "batch", "colour": "red"}, "colour"),
        ({"purpose": "batch", "expires_after[seconds]": "7200"}, "expires_after[anchor]"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "60",
            },
            "expires_after[seconds]",
        ),
        ({"purpose": "batch" * 5000}, "purpose"),
    ],
)
def test_a_bad_field_is_named_and_nothing_is_kept(
    api: ApiServer, stores: Stores, fields: dict[str, str], param: str
) -> None:
    """The error says which field, and the upload leaves no trace."""
    answer = httpx.post(f"{api.base_url}/files", data=fields, files={"file": ("a", b"x")})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert _leftovers(stores) == []


def test_fields_may_follow_the_file(api: ApiServer) -> None:
    """The order of a form's parts says nothing."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhello\r\n'
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{api.base_url}/files", content=body, headers=headers)
    assert (answer.status_code, answer.json()["bytes"]) == (200, 5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "closing boundary"),
        (b"rubbish", "closing boundary"),
        (b"--b--\r\n", "no file part"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--', "no file"),
        (b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n", "Content-Disposition"),
        (b'--b\r\nContent-Disposition: form-data; filename="a"\r\n\r\nx\r\n--b--\r\n', "no name"),
        (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n', "filename"),
        (b'--b\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\nx\r\n--b--\r\n', "read"),
        (b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n\xff\r\n--b--', "UTF-8"),
        (b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nxx', "closing"),
        (b"--b\r\nX: " + b"y" * 700_000, "headers do not end"),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n' * 2
            + b"--b--\r\n",
            "more than one file",
        ),
        (
            b"".join(
                b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % number
                for number in range(20)
            )
            + b"--b--\r\n",
            "more than 16 parts",
        ),
    ],
)
def test_a_broken_form_is_a_clear_error(
    api: ApiServer, stores: Stores, body: bytes, says: str
) -> None:
    """Whatever is wrong with the form, it is a 400 that says so, and nothing is kept."""
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{api.base_url}/files", content=body, headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert _leftovers(stores) == []


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415),
        ("multipart/form-data", 400),
        (f"multipart/form-data; boundary={'b' * 300}", 400),
    ],
)
def test_a_body_that_is_no_form_is_refused(api: ApiServer, content_type: str, status: int) -> None:
    """Only ``multipart/form-data`` with a usable boundary is read."""
    headers = {"content-type": content_type}
    answer = httpx.post(f"{api.base_url}/files", content=b"x", headers=headers)
    assert answer.status_code == status


def test_a_file_over_the_limit_is_refused(
    api: ApiServer, sdk: openai.OpenAI, stores: Stores
) -> None:
    """Too large is a 413 that names the limit, whether or not the client announces the length."""
    with pytest.raises(openai.APIStatusError) as refused:
        sdk.files.create(file=("big", b"x" * (10 << 20)), purpose="batch")
    assert refused.value.status_code == 413
    assert str(9 << 20) in str(refused.value)

    def chunked():  # noqa: ANN202 - a generator of pieces without an announced length
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(9):
            yield b"x" * (1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{api.base_url}/files", content=chunked(), headers=headers)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert _leftovers(stores) == []


def test_a_body_shorter_than_announced_is_refused(api: ApiServer, stores: Stores) -> None:
    """A connection that breaks off in the middle does not become a file."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhello\r\n--b--\r\n'
    )
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(form) + 100}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    answer = api.request(head.encode() + form)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"ended after" in answer
    assert _leftovers(stores) == []


def test_the_same_idempotency_key_uploads_once(sdk: openai.OpenAI) -> None:
    """A replay answers with the first file; other content under the key is an error."""
    headers = {"Idempotency-Key": "upload-1"}
    raw = sdk.files.with_raw_response

    def upload(content: bytes):  # noqa: ANN202
        return raw.create(file=("k.txt", content), purpose="assistants", extra_headers=headers)

    first, second = upload(b"same"), upload(b"same")
    assert second.parse().id == first.parse().id
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(list(sdk.files.list(purpose="assistants"))) == 1
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        upload(b"other")
    assert refused.value.code == "idempotency_mismatch"


def test_a_failed_request_frees_its_idempotency_key(sdk: openai.OpenAI) -> None:
    """The key may be used again for the corrected request."""
    headers = {"Idempotency-Key": "upload-2"}
    with pytest.raises(openai.BadRequestError):
        sdk.files.create(file=("k", b"x"), purpose="nonsense", extra_headers=headers)  # type: ignore[arg-type]
    made = sdk.files.create(file=("k", b"x"), purpose="batch", extra_headers=headers)
    assert made.purpose == "batch"


def test_a_large_upload_needs_little_memory(start_api: StartApi) -> None:
    """The server's memory does not grow with the file, which goes to disk as it comes."""
    size = 128 << 20
    with start_api(max_upload_bytes=size + (1 << 20)) as server:
        before = _peak_rss_bytes(server)
        made = server.client().files.create(
            file=("big.jsonl", io.BytesIO(b"\n" * size)), purpose="batch"
        )
        grown = _peak_rss_bytes(server) - before
        content = server.folder / "data" / "files" / made.id / "content"
        with content.open("rb") as stored:
            digest = hashlib.file_digest(stored, "sha256").hexdigest()
    assert made.bytes == size
    assert digest == hashlib.sha256(b"\n" * size).hexdigest()
    assert grown < 32 << 20


def _peak_rss_bytes(server: ApiServer) -> int:
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{children[0]}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
