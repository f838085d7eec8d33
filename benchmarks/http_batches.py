"""Batches through HTTP, as any client would run them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

TERMINAL = frozenset({"completed", "failed", "expired", "cancelled"})
_POLL_S = 0.05
_TIMEOUT = httpx.Timeout(600)


class Page(NamedTuple):
    """Some result lines, the cursor behind them, and whether there will be no more."""

    lines: bytes
    next_after: str
    complete: bool


class BatchClient:
    """A keep-alive connection to one API."""

    def __init__(self, base_url: str) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def upload(self, path: Path) -> str:
        """Stream a file up and return its id."""
        with open(path, "rb") as stream:
            return str(
                self._json(
                    self._http.post(
                        "files",
                        data={"purpose": "batch"},
                        files={"file": (path.name, stream, "application/jsonl")},
                    )
                )["id"]
            )

    def submit(self, file_id: str) -> str:
        """Start a batch over an uploaded file and return its id."""
        body = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        return str(self._json(self._http.post("batches", json=body))["id"])

    def caption(self, images: Path, model: str, prompt: str) -> str:
        """Start captioning an image set of the server, with the quality gate; returns the batch's id."""
        body = {"model": model, "images": str(images), "prompt": prompt, "quality": {}}
        return str(self._json(self._http.post("captions", json=body))["id"])

    def results(self, batch_id: str, after: str, limit: int) -> Page:
        """Some lines behind a cursor, of a batch that may still run."""
        query = {"after": after, "limit": limit}
        response = _good(self._http.get(f"batches/{batch_id}/results", params=query))
        return Page(
            response.content,
            response.headers["vlmq-next-after"],
            complete=response.headers["vlmq-complete"] == "true",
        )

    def provenance(self, batch_id: str) -> list[dict[str, Any]]:
        """What the answers came of."""
        found: list[dict[str, Any]] = self._json(self._http.get(f"batches/{batch_id}/provenance"))[
            "data"
        ]
        return found

    def batch(self, batch_id: str) -> dict[str, Any]:
        """The batch as it is now."""
        return self._json(self._http.get(f"batches/{batch_id}"))

    def cancel(self, batch_id: str) -> None:
        """Ask for a batch to end early."""
        self._json(self._http.post(f"batches/{batch_id}/cancel"))

    def retry(self, batch_id: str) -> str:
        """Start a batch of what failed in one that has ended; returns its id."""
        return str(self._json(self._http.post(f"batches/{batch_id}/retry"))["id"])

    def wait(self, batch_id: str, limit_s: float) -> dict[str, Any]:
        """Wait until a batch has ended. Raises: TimeoutError."""
        deadline = time.monotonic() + limit_s
        while (batch := self.batch(batch_id))["status"] not in TERMINAL:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{batch_id} is {batch['status']} after {limit_s:g} s")
            time.sleep(_POLL_S)
        return batch

    def output_lines(self, file_id: str) -> Iterator[bytes]:
        """The lines of a result file, streamed."""
        with self._http.stream("GET", f"files/{file_id}/content") as response:
            response.raise_for_status()
            rest = b""
            for piece in response.iter_bytes(1 << 20):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
            assert not rest, "the file does not end with a line feed"

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        body: dict[str, Any] = _good(response).json()
        return body


def _good(response: httpx.Response) -> httpx.Response:
    """The response, if it is none of an error. Raises: AssertionError with its text."""
    if response.is_error:
        raise AssertionError(f"HTTP {response.status_code}: {response.text}")
    return response


def run_to_end(client: BatchClient, file_id: str, limit_s: float) -> tuple[float, dict[str, Any]]:
    """Seconds from the POST that creates the batch to its output file's being there, and it."""
    start = time.perf_counter()
    batch = client.wait(client.submit(file_id), limit_s)
    elapsed_s = time.perf_counter() - start
    assert batch["status"] == "completed", f"the batch ended {batch['status']}: {batch['errors']}"
    assert batch["error_file_id"] is None, f"items failed: {batch['request_counts']}"
    return elapsed_s, batch
