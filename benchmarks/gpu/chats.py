"""Time to the first token of a chat about one picture, over HTTP."""

from __future__ import annotations

import http
import http.client
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.work import MODEL, SAMPLING, Work, content_of

CHAT_TOKENS = 16
"""Enough to see the first one come; the time to it does not depend on the rest."""
_TIMEOUT_S = 60.0


def first_token_times(
    port: int, paths: Sequence[Path], work: Work, *, new_tokens: int = CHAT_TOKENS
) -> list[float]:
    """Seconds from the request to its first word, one stream after the other.

    Raises: AssertionError if a stream fails or has no word.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        return [_first_token_s(connection, path, work, new_tokens) for path in paths]
    finally:
        connection.close()


def _first_token_s(
    connection: http.client.HTTPConnection, path: Path, work: Work, new_tokens: int
) -> float:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content_of(path, work)}],
        "max_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "stream": True,
        **SAMPLING,
    }
    first_s = 0.0
    start = time.perf_counter()
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    response = connection.getresponse()
    assert response.status == http.HTTPStatus.OK, response.read()
    while (line := response.readline().strip()) != b"data: [DONE]":
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        assert "error" not in event, event
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            first_s = first_s or time.perf_counter() - start
    response.read()
    assert first_s, "the stream had no word"
    return first_s
