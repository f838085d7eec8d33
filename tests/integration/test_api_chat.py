"""Chat over HTTP: what the client gets for each thing that a worker can report.

The worker's part is played by a thread that speaks the workers' protocol through the real
``ChatDesk`` and follows a script, because no engine fails on command in all of these ways. The
whole path with real workers and engines is in ``test_api_chat_node.py``.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.resources.chat.completions import Completions

from shared.chats import ChatDesk, ChatEvent, ChatJob
from shared.clock import unix_now
from shared.errors import EngineCrashed, ImageTruncated
from shared.presence import NodeReport, ReplicaReport
from shared.stores import Stores
from tests.integration.api_server import ApiServer, StartApi

Script = Callable[["Answering"], None]
HELLO: Any = [{"role": "user", "content": "hello"}]


class Answering:
    """One request in the hands of the scripted worker."""

    def __init__(self, worker: ScriptedWorker, job: ChatJob) -> None:
        self.job = job
        self.aborted = threading.Event()
        self._worker = worker

    def say(self, text: str) -> None:
        self._send("delta", text)

    def end(self, reason: str = "stop", prompt_tokens: int = 7, completion_tokens: int = 2) -> None:
        event = ChatEvent(
            self.job.id, self.job.submission, "end", reason, prompt_tokens, completion_tokens
        )
        self._worker.desk.send(self.job.inbox, event)

    def fail(self, error: Any) -> None:
        event = ChatEvent(
            self.job.id,
            self.job.submission,
            "error",
            error.message,
            code=error.code,
            param=error.param,
        )
        self._worker.desk.send(self.job.inbox, event)

    def _send(self, kind: Any, text: str) -> None:
        event = ChatEvent(self.job.id, self.job.submission, kind, text)
        self._worker.desk.send(self.job.inbox, event)


class ScriptedWorker:
    """Claims every chat request as a consumer does and answers it by its model's script."""

    def __init__(self, stores: Stores, scripts: dict[str, Script]) -> None:
        self.answering: dict[str, Answering] = {}
        self.desk = ChatDesk(stores.redis)
        self._stores = stores
        self._scripts = scripts
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=256)
        self._threads = [
            threading.Thread(target=self._run),
            threading.Thread(target=self.desk.watch_aborts, args=(self._on_abort,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        beat_at = 0.0
        while not self._closed.is_set():
            if time.monotonic() > beat_at:
                self._stores.presence.consumer_beat("scripted")
                self._stores.presence.announce(self._report())
                beat_at = time.monotonic() + 2
            for key in self._stores.redis.keys("vlmq:chat:*"):
                job = self.desk.take(key.decode().removeprefix("vlmq:chat:"))
                if job is not None:
                    self._start(job)
            time.sleep(0.002)

    def _report(self) -> NodeReport:
        replicas = [ReplicaReport(name, 0, "ready") for name in self._scripts]
        return NodeReport("scripted", unix_now(), replicas)

    def _start(self, job: ChatJob) -> None:
        answering = self.answering[job.id] = Answering(self, job)
        answering._send("claimed", "scripted")
        self._pool.submit(self._scripts[job.model], answering)

    def _on_abort(self, chat_id: str) -> None:
        if chat_id in self.answering:
            self.answering[chat_id].aborted.set()

    def close(self) -> None:
        self._closed.set()
        self._threads[0].join()
        self._pool.shutdown()
        self.desk.close()


def _hello(answering: Answering) -> None:
    answering.say("Hel")
    answering.say("lo ")
    time.sleep(0.1)
    answering.say("wörld")
    answering.end()


def _endless(answering: Answering) -> None:
    """Words until somebody aborts it."""
    deadline = time.monotonic() + 30
    while not answering.aborted.wait(0.05) and time.monotonic() < deadline:
        answering.say("on and ")
    answering.end("length")


def _silent(answering: Answering) -> None:
    """One word, then nothing until somebody aborts it."""
    answering.say("well")
    answering.aborted.wait(30)
    answering.end()


def _mute(answering: Answering) -> None:
    """Nothing at all until somebody aborts it."""
    answering.aborted.wait(30)
    answering.end()


def _refuses(answering: Answering) -> None:
    answering.fail(ImageTruncated(param="messages[0].content[1]"))


def _crashes(answering: Answering) -> None:
    answering.say("so far")
    time.sleep(0.2)
    answering.fail(EngineCrashed())


def _echoes(answering: Answering) -> None:
    answering.say(answering.job.body.decode())
    answering.end()


SCRIPTS: dict[str, Script] = {
    "hello": _hello,
    "endless": _endless,
    "silent": _silent,
    "mute": _mute,
    "refuses": _refuses,
    "crashes": _crashes,
    "echoes": _echoes,
}


@pytest.fixture(scope="module")
def api(start_api: StartApi) -> Iterator[ApiServer]:
    """A server with many threads."""
    with start_api(threads=240, max_body_bytes=4 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def worker(api: ApiServer, stores: Stores) -> Iterator[ScriptedWorker]:
    """The scripted worker, serving one model per script."""
    for name in [*SCRIPTS, "nobody"]:
        stores.models.link(name, None, engine="echo")
    worker = ScriptedWorker(stores, SCRIPTS)
    try:
        _wait_for(lambda: stores.presence.nodes() != [])
        time.sleep(1.1)  # the server's lookups may be a second old
        yield worker
    finally:
        worker.close()


@pytest.fixture
def chat(worker: ScriptedWorker, sdk: openai.OpenAI) -> Completions:
    """The SDK's chat completions."""
    return sdk.chat.completions


# --- whole answers ---


def test_a_plain_answer_is_a_chat_completion(chat: Completions) -> None:
    """Text, reason and counts as the worker reported them."""
    answer = chat.create(model="hello", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "hello"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello wörld")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)
    assert answer.usage.total_tokens == 9


def test_the_worker_gets_the_body_as_it_was_sent(chat: Completions) -> None:
    """Parameters, extensions and images reach the worker; defaults are its own business."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "what is this?"}, image]
    answer = chat.create(
        model="echoes",
        messages=[{"role": "user", "content": content}],
        temperature=0.5,
        seed=3,
        extra_body={"top_k": 5},
    )
    got = json.loads(answer.choices[0].message.content)
    assert got["messages"][0]["content"] == content
    assert (got["temperature"], got["seed"], got["top_k"]) == (0.5, 3, 5)
    assert "max_tokens" not in got


def test_a_refused_image_is_a_bad_request(chat: Completions) -> None:
    """What the worker finds wrong has the status and the field it deserves, streamed or not."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat.create(model="refuses", messages=HELLO, stream=stream)
        assert refused.value.code == "image_truncated"
        assert refused.value.param == "messages[0].content[1]"


def test_a_crash_is_a_503_to_be_tried_again(chat: Completions) -> None:
    """The SDK may retry."""
    with pytest.raises(openai.InternalServerError) as failed:
        chat.create(model="crashes", messages=HELLO)
    assert (failed.value.status_code, failed.value.code) == (503, "engine_crashed")
    assert failed.value.response.headers["retry-after"] == "1"


def test_unknown_and_unserved_models_are_different_errors(chat: Completions) -> None:
    """404 for a name nobody linked, 503 for one that no worker serves."""
    with pytest.raises(openai.NotFoundError) as missing:
        chat.create(model="no-such", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.InternalServerError) as unserved:
        chat.create(model="nobody", messages=HELLO)
    assert (unserved.value.status_code, unserved.value.code) == (503, "model_unavailable")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": []}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_query": {"beam": "2"}}, "beam"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ],
)
def test_an_unsupported_parameter_is_named(
    chat: Completions, changes: dict[str, Any], param: str
) -> None:
    """Never silently ignored."""
    arguments = {"model": "hello", "messages": HELLO, **changes}
    with pytest.raises(openai.BadRequestError) as refused:
        chat.create(**arguments)
    assert (refused.value.param or "").replace("[...]", "[0]") == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'{"model": "hello", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "hello", "messages": ' + b"[" * 200_000,
        b'{"model": "hello", "metadata": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001,
        b'{"model": "hello", "user": "x", "messages": '
        + b"[" * 5000
        + b"]" * 5000
        + b', "seed": 1}',
    ],
)
def test_a_hostile_body_is_a_bad_request(
    api: ApiServer, worker: ScriptedWorker, body: bytes
) -> None:
    """Broken UTF-8 and absurd nesting are 400s, and the server lives on."""
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{api.base_url}/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_refused(chat: Completions) -> None:
    """With the limit in the message."""
    with pytest.raises(openai.APIStatusError) as refused:
        chat.create(model="hello", messages=[{"role": "user", "content": "x" * (5 << 20)}])
    assert refused.value.status_code == 413
    assert str(4 << 20) in refused.value.message


def test_an_idempotency_key_replays_a_finished_answer(
    chat: Completions, worker: ScriptedWorker
) -> None:
    """The second request reaches no worker."""
    headers = {"Idempotency-Key": "chat-1"}
    first = chat.create(model="hello", messages=HELLO, extra_headers=headers)
    seen = len(worker.answering)
    assert chat.create(model="hello", messages=HELLO, extra_headers=headers) == first
    assert len(worker.answering) == seen


# --- streams ---


def test_a_stream_is_a_role_then_text_then_a_reason(chat: Completions) -> None:
    """The pieces join to the whole answer."""
    chunks = list(chat.create(model="hello", messages=HELLO, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello wörld"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_when_asked_for(chat: Completions) -> None:
    """In a chunk without choices; the others say null."""
    *rest, last = chat.create(
        model="hello", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 2)
    assert all(chunk.usage is None for chunk in rest)


def test_the_bytes_of_a_stream_are_server_sent_events(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    """``data:`` lines, blank lines between them, ``[DONE]`` at the end."""
    with _streaming(api, "hello") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"]
        text = answer.read().decode()
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: {") for frame in frames[:-2])


def test_the_first_words_arrive_before_the_last_are_made(
    chat: Completions, worker: ScriptedWorker
) -> None:
    """A stream is not held back: its end comes only after the client has seen the beginning."""
    stream = chat.create(model="silent", messages=HELLO, stream=True)
    seen = next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert seen.choices[0].delta.content == "well"
    stream.close()


def test_a_failure_in_mid_stream_is_an_error_event(api: ApiServer, chat: Completions) -> None:
    """What came before stays; no ``[DONE]`` pretends that all is well."""
    got: list[str] = []
    stream = chat.create(model="crashes", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as failed:
        got.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(got) == "so far"
    assert failed.value.code == "engine_crashed"
    with _streaming(api, "crashes") as answer:
        text = answer.read().decode()
    assert "[DONE]" not in text
    assert set(json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


# --- clients that go away ---


@pytest.mark.parametrize("model", ["endless", "silent", "mute"])
@pytest.mark.parametrize("stream", [True, False])
def test_work_for_a_client_that_has_gone_is_stopped(
    api: ApiServer, worker: ScriptedWorker, model: str, stream: bool
) -> None:
    """Whether it was being told much, a little or nothing, whether streamed or not."""
    before = set(worker.answering)
    with api.connect() as connection:
        connection.sendall(_request(model, stream))
        _wait_for(lambda: set(worker.answering) - before)
        [mine] = set(worker.answering) - before
    assert worker.answering[mine].aborted.wait(15)


def test_200_streams_at_once_all_end_well(api: ApiServer, worker: ScriptedWorker) -> None:
    """Each gets the whole answer and its end."""

    def one(_: int) -> bytes:
        with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
            connection.sendall(_request("hello", stream=True))
            received = b""
            while b"[DONE]" not in received:
                piece = connection.recv(65536)
                assert piece, received
                received += piece
        return received

    with ThreadPoolExecutor(max_workers=200) as pool:
        answers = list(pool.map(one, range(200)))
    assert all("wörld".encode() in answer for answer in answers)


def test_a_pipelined_request_does_not_count_as_gone(api: ApiServer, worker: ScriptedWorker) -> None:
    """Bytes that wait on the connection are the next request, not a farewell."""
    with api.connect() as connection:
        connection.sendall(_request("hello", stream=False) * 2)
        received = b""
        while received.count(b'"chat.completion"') < 2:
            piece = connection.recv(65536)
            assert piece, received
            received += piece


def test_a_stream_longer_than_the_drain_is_ended_and_its_work_stopped(
    start_api: StartApi,
) -> None:
    """SIGTERM: the client is told to try again, the worker to stop, and the server exits."""
    with start_api() as server, contextlib.closing(Stores.connect(server.settings)) as stores:
        stores.models.link("endless", None, engine="echo")
        worker = ScriptedWorker(stores, SCRIPTS)
        try:
            _wait_for(lambda: stores.presence.nodes() != [])
            with server.connect() as connection:
                connection.sendall(_request("endless", stream=True))
                _wait_for(lambda: worker.answering)
                assert server.stop() == 0
                received = b""
                while piece := connection.recv(65536):
                    received += piece
            [mine] = worker.answering.values()
            assert mine.aborted.wait(5)
            assert b"this server is stopping" in received
            assert b"[DONE]" not in received
        finally:
            worker.close()


def _request(model: str, stream: bool) -> bytes:
    body = json.dumps({"model": model, "messages": HELLO, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def _streaming(api: ApiServer, model: str) -> Iterator[httpx.Response]:
    body = {"model": model, "messages": HELLO, "stream": True}
    with httpx.stream("POST", f"{api.base_url}/chat/completions", json=body) as answer:
        yield answer


def _wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
