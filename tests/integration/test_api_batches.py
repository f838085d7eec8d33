"""Batches over HTTP, driven by the unmodified SDK. No worker runs: they stay ``validating``."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from shared.stores import Stores
from tests.integration.api_server import ApiServer, StartApi

LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'
_PARTS = ("results", "retry")
KEYS = {
    "id",
    "object",
    "endpoint",
    "model",
    "errors",
    "input_file_id",
    "completion_window",
    "status",
    "output_file_id",
    "error_file_id",
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
    "request_counts",
    "usage",
    "metadata",
    "vlmq",
}


@pytest.fixture(scope="module")
def file_id(sdk: openai.OpenAI) -> str:
    """An uploaded input."""
    return sdk.files.create(file=("in.jsonl", LINE), purpose="batch").id


def _create(sdk: openai.OpenAI, file_id: str, **changes: Any) -> openai.types.Batch:
    arguments = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return sdk.batches.create(**{**arguments, **changes})


def test_a_created_batch_says_everything_it_will_ever_say(sdk: openai.OpenAI, file_id: str) -> None:
    """Every key of the object is there from the start, with its type."""
    raw = sdk.batches.with_raw_response.create(
        input_file_id=file_id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"who": "me"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    body = raw.http_response.json()
    assert set(body) == KEYS
    assert body["vlmq"] == {
        "warning": None,
        "retry_of": None,
        "captions": None,
        "listing": None,
        "progress": {"items_per_second": None, "seconds_left": None},
        "failures": {},
        "quality": None,
        "preflight": None,
        "sync": None,
    }
    made = raw.parse()
    assert (made.object, made.status, made.endpoint) == (
        "batch",
        "validating",
        "/v1/chat/completions",
    )
    assert (made.input_file_id, made.metadata) == (file_id, {"who": "me"})
    assert made.expires_at == made.created_at + 24 * 3600
    assert made.request_counts is not None
    assert made.request_counts.to_dict() == {"total": 0, "completed": 0, "failed": 0}
    assert made.usage is not None
    assert made.usage.input_tokens_details.cached_tokens == 0
    assert sdk.batches.retrieve(made.id) == made


@pytest.mark.parametrize(("window", "seconds"), [("90m", 5400), ("48h", 172_800), ("7d", 604_800)])
def test_other_windows_are_accepted(
    sdk: openai.OpenAI, file_id: str, window: str, seconds: int
) -> None:
    """Minutes, hours and days, beyond OpenAI's 24h."""
    made = _create(sdk, file_id, completion_window=window)
    assert made.completion_window == window
    assert made.expires_at == made.created_at + seconds


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "24h\n"}, "completion_window"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"input_file_id": "file-0123456789abcdef01234567"}, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, "input_file_id"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": {"deep": "x"}}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
        ({"extra_body": {"priority": "high"}}, "priority"),
    ],
)
def test_a_bad_field_is_named(
    sdk: openai.OpenAI, file_id: str, changes: dict[str, Any], param: str
) -> None:
    """A 400 whose ``param`` is the field."""
    with pytest.raises(openai.BadRequestError) as refused:
        _create(sdk, file_id, **changes)
    assert (refused.value.param or "").startswith(param)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id


def test_a_file_for_another_purpose_is_refused(sdk: openai.OpenAI) -> None:
    """A picture is not a list of requests."""
    picture = sdk.files.create(file=("a.png", b"x"), purpose="vision").id
    with pytest.raises(openai.BadRequestError) as refused:
        _create(sdk, picture)
    assert refused.value.param == "input_file_id"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"input_file_id": "\xff"}', "invalid_json"),
        (b'{"input_file_id": "\\ud800"}', "invalid_json"),
        (b'{"metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "invalid_json"),
        (b"[" * 500_000, "invalid_json"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(api: ApiServer, body: bytes, code: str) -> None:
    """Broken, binary and absurdly nested bodies are 400s."""
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{api.base_url}/batches", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_a_body_of_another_type_is_refused(api: ApiServer) -> None:
    """A form is not JSON."""
    answer = httpx.post(f"{api.base_url}/batches", data={"endpoint": "x"})
    assert answer.status_code == 415


def test_a_body_over_the_limit_is_not_read(api: ApiServer) -> None:
    """413 for the announced length alone: not one byte of the body was sent."""
    head = b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = api.request(head + b"Content-Length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert str(1 << 20).encode() in answer


def test_paging_visits_every_batch_once_and_newest_first(start_api: StartApi) -> None:
    """The SDK's pager goes on until ``has_more`` is false; 20 is the default page."""
    with start_api() as server:
        sdk = server.client()
        source = sdk.files.create(file=("in.jsonl", LINE), purpose="batch").id
        made = [_create(sdk, source).id for _ in range(23)]
        assert [batch.id for batch in sdk.batches.list(limit=4)] == made[::-1]
        first = sdk.batches.list()
        assert (len(first.data), first.has_more) == (20, True)
        second = sdk.batches.list(after=first.data[-1].id)
        assert ([batch.id for batch in second.data], second.has_more) == (made[2::-1], False)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"after": "batch_0123456789abcdef01234567"}, "after"),
        ({"extra_query": {"limit": "many"}}, "limit"),
        ({"extra_query": {"before": "x"}}, "before"),
    ],
)
def test_a_bad_query_is_named(sdk: openai.OpenAI, query: dict[str, Any], param: str) -> None:
    """A 400 whose ``param`` is the query parameter."""
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.batches.list(**query)
    assert refused.value.param == param


def test_a_cancelled_batch_is_cancelling_until_it_has_ended(
    sdk: openai.OpenAI, file_id: str
) -> None:
    """The wire has a status for what is a field inside. Asking twice is no error."""
    made = _create(sdk, file_id)
    cancelled = sdk.batches.cancel(made.id)
    assert cancelled.status == "cancelling"
    assert cancelled.cancelling_at is not None
    assert sdk.batches.cancel(made.id).status == "cancelling"


def test_a_batch_that_has_ended_cannot_be_cancelled(
    sdk: openai.OpenAI, stores: Stores, file_id: str
) -> None:
    """A 400, not the 409 that the SDK would send again, and it says not to retry."""
    made = _create(sdk, file_id)
    stores.redis.hset(f"vlmq:batch:{made.id}", "state", "completed")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.batches.cancel(made.id)
    assert refused.value.code == "illegal_transition"
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_an_input_in_use_cannot_be_deleted(sdk: openai.OpenAI) -> None:
    """A conflict for good, which the SDK must not send again."""
    source = sdk.files.create(file=("in.jsonl", LINE), purpose="batch").id
    _create(sdk, source)
    with pytest.raises(openai.ConflictError) as refused:
        sdk.files.delete(source)
    assert refused.value.code == "file_in_use"
    assert refused.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("batch_id", ["batch_0", "nonsense", "file-1a2041a0f10eab"])
def test_an_unknown_batch_is_not_found(sdk: openai.OpenAI, batch_id: str) -> None:
    """Reading and cancelling alike."""
    for call in (sdk.batches.retrieve, sdk.batches.cancel):
        with pytest.raises(openai.NotFoundError) as missing:
            call(batch_id)
        assert missing.value.code == "not_found"


def test_the_same_idempotency_key_creates_one_batch(sdk: openai.OpenAI, file_id: str) -> None:
    """A replay answers with the first batch."""
    headers = {"Idempotency-Key": "batch-1"}
    first = _create(sdk, file_id, extra_headers=headers)
    assert _create(sdk, file_id, extra_headers=headers).id == first.id
    with pytest.raises(openai.UnprocessableEntityError):
        _create(sdk, file_id, completion_window="1h", extra_headers=headers)


def test_an_idempotency_key_has_a_bound(sdk: openai.OpenAI, file_id: str) -> None:
    """At most 255 characters."""
    with pytest.raises(openai.BadRequestError) as refused:
        _create(sdk, file_id, extra_headers={"Idempotency-Key": "k" * 256})
    assert refused.value.param == "Idempotency-Key"


def test_lines_and_retries_of_another_owner_are_not_found(start_api: StartApi) -> None:
    """As if the batch were not there; without a key nobody is told anything."""
    with start_api(owners=("ann", "bob")) as server:
        ann = server.client(server.secrets["ann"])
        batch = _create(ann, ann.files.create(file=("in.jsonl", LINE), purpose="batch").id)
        lines, retry = (f"{server.base_url}/batches/{batch.id}/{what}" for what in _PARTS)
        keys = {name: {"authorization": f"Bearer {key}"} for name, key in server.secrets.items()}
        own = httpx.get(lines, headers=keys["ann"])
        assert (own.status_code, own.headers["vlmq-complete"]) == (200, "false")
        assert own.headers["vlmq-next-after"] == "0"
        assert httpx.post(retry, headers=keys["ann"]).json()["error"]["code"] == (
            "illegal_transition"
        )
        for answer in (
            httpx.get(lines, headers=keys["bob"]),
            httpx.post(retry, headers=keys["bob"]),
        ):
            assert answer.status_code == 404
            assert batch.id in answer.json()["error"]["message"]
        assert httpx.get(lines).status_code == httpx.post(retry).status_code == 401
