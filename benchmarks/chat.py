"""What the whole path adds to one chat, over calling the engine's socket directly.

One request at a time: over a kept-alive HTTP connection (gunicorn, Redis, Celery, the chat
consumer, the engine and back), and from this process straight to the engine process. The two take
turns, so that noise meets both. Then the same while batches saturate the node. The engine answers
at once, so all that is measured is the way there and back.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.http_batches import BatchClient
from benchmarks.items import MODEL, item_text, write_input
from benchmarks.nodes import echo_node, warm_up
from benchmarks.report import Figure, Target, milliseconds, percentile
from benchmarks.scale import Scale
from shared.errors import VlmqError
from tests.running_node import RunningNode, wait_for
from workers.inference.engines.base import Delta, Prompt, Sampling, Turn
from workers.inference.engines.client import EngineClient

_WARM_UP = 20
_TIMEOUT_S = 60.0
_MAX_TOKENS = 64
_IDLE = {50: Target("<=", 8), 99: Target("<=", 20)}
_SATURATED = {50: Target("<=", 16), 99: Target("<=", 40)}


class _Times(msgspec.Struct):
    """Seconds, one entry per request."""

    whole: list[float] = []
    first_delta: list[float] = []
    streamed: list[float] = []


def measure(scale: Scale) -> list[Figure]:
    """Measure on an idle node, then on the same one under load."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        echo_node() as node,
        BatchClient(node.base_url) as client,
    ):
        warm_up(client, Path(name))
        _sample(node, _WARM_UP)
        figures = _figures("idle", *_sample(node, scale.chat_samples), _IDLE)
        batches = _saturate(client, Path(name), scale)
        before, start, ticks = _completed(client, batches), time.monotonic(), _ticks()
        figures += _figures("saturated", *_sample(node, scale.chat_samples), _SATURATED)
        idle, all_ticks = (after - then for after, then in zip(_ticks(), ticks, strict=True))
        rate = (_completed(client, batches) - before) / (time.monotonic() - start)
        _require_unfinished(client, batches)
    figures.append(Figure("chat", "saturated: the batches meanwhile", rate, "items/s"))
    figures.append(Figure("chat", "saturated: processors idle", 100 * idle / all_ticks, "%"))
    return figures


# --- load ---


def _saturate(client: BatchClient, folder: Path, scale: Scale) -> list[str]:
    """Start many batches and wait until all of them have been planned and run by turns."""
    source = folder / "load.jsonl"
    write_input(source, scale.items)
    file_id = client.upload(source)
    batches = [client.submit(file_id) for _ in range(scale.load_batches)]
    waiting = list(batches)

    def all_run() -> bool:
        while waiting and client.batch(waiting[-1])["request_counts"]["completed"] > 0:
            waiting.pop()
        return not waiting

    wait_for(all_run, "the load", _TIMEOUT_S)
    return batches


def _ticks() -> tuple[int, int]:
    """What all processors of this machine have been so far: idle, and anything at all."""
    times = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return times[3], sum(times)


def _completed(client: BatchClient, batches: Sequence[str]) -> int:
    return sum(client.batch(batch)["request_counts"]["completed"] for batch in batches)


def _require_unfinished(client: BatchClient, batches: Sequence[str]) -> None:
    if all(client.batch(batch)["status"] != "in_progress" for batch in batches):
        raise AssertionError("the batches ended before the chats did: raise Scale.load_batches")


# --- chats ---


def _sample(node: RunningNode, samples: int) -> tuple[_Times, _Times]:
    """Times through HTTP and times straight to the engine."""
    through_http, direct = _Times(), _Times()
    engine = EngineClient(node.settings.run_dir, MODEL, wait_s=_TIMEOUT_S)
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=_TIMEOUT_S)
    try:
        for number in range(samples):
            text = item_text(number)
            _direct_whole(engine, text, direct)
            _http_whole(connection, text, through_http)
            _direct_stream(engine, text, direct)
            _http_stream(connection, text, through_http)
    finally:
        connection.close()
        engine.close()
    return through_http, direct


def _direct_whole(engine: EngineClient, text: str, times: _Times) -> None:
    start = time.perf_counter()
    answer = engine.complete(_prompt(text), timeout_s=_TIMEOUT_S)
    times.whole.append(time.perf_counter() - start)
    assert answer.text == text


def _direct_stream(engine: EngineClient, text: str, times: _Times) -> None:
    ended = threading.Event()
    texts: list[str] = []
    arrivals: list[float] = []
    errors: list[VlmqError] = []

    def on_delta(delta: Delta) -> None:
        arrivals.append(time.perf_counter())
        texts.append(delta.text)

    def on_end(error: VlmqError | None) -> None:
        errors.extend([error] if error else [])
        ended.set()

    start = time.perf_counter()
    engine.stream(_prompt(text), on_delta, on_end)
    assert ended.wait(_TIMEOUT_S)
    times.streamed.append(time.perf_counter() - start)
    times.first_delta.append(arrivals[0] - start)
    assert not errors, errors
    assert "".join(texts) == text


def _http_whole(connection: http.client.HTTPConnection, text: str, times: _Times) -> None:
    start = time.perf_counter()
    response = _post(connection, text, stream=False)
    body = response.read()
    times.whole.append(time.perf_counter() - start)
    assert json.loads(body)["choices"][0]["message"]["content"] == text


def _http_stream(connection: http.client.HTTPConnection, text: str, times: _Times) -> None:
    texts: list[str] = []
    start = time.perf_counter()
    first_s = 0.0
    response = _post(connection, text, stream=True)
    while (line := response.readline().strip()) != b"data: [DONE]":
        if not line.startswith(b"data: "):
            continue
        delta = json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]
        if delta.get("content"):
            first_s = first_s or time.perf_counter() - start
            texts.append(delta["content"])
    times.streamed.append(time.perf_counter() - start)
    times.first_delta.append(first_s)
    response.read()
    assert "".join(texts) == text


def _post(
    connection: http.client.HTTPConnection, text: str, *, stream: bool
) -> http.client.HTTPResponse:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": _MAX_TOKENS,
        "stream": stream,
    }
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    response = connection.getresponse()
    assert response.status == http.HTTPStatus.OK, response.read()
    return response


def _prompt(text: str) -> Prompt:
    return Prompt(1, [Turn("user", [text])], Sampling(max_tokens=_MAX_TOKENS))


def _figures(
    state: str, through_http: _Times, direct: _Times, targets: dict[int, Target]
) -> list[Figure]:
    """What HTTP's percentiles have more than the direct ones."""
    pairs = {
        "whole answer": (through_http.whole, direct.whole),
        "first delta": (through_http.first_delta, direct.first_delta),
        "whole stream": (through_http.streamed, direct.streamed),
    }
    figures = []
    for name, (slow, fast) in pairs.items():
        for percent, target in targets.items():
            over_http = milliseconds(percentile(slow, percent))
            straight = milliseconds(percentile(fast, percent))
            figures.append(
                Figure(
                    "chat",
                    f"{state}: {name}, added p{percent}",
                    over_http - straight,
                    "ms",
                    target,
                    f"{over_http:.1f} - {straight:.1f} ms",
                )
            )
    return figures
