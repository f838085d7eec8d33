"""The HTTP client of the command line: one method per thing the commands ask the server.

Every failure becomes a :class:`ServerTrouble` whose message says what to do next.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, cast

import click
import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 900.0
_BLOCK_BYTES = 256 * 1024

Json = dict[str, Any]


class ServerTrouble(click.ClickException):
    """The server refused, failed or was not there. ``passing`` says that waiting may help."""

    def __init__(self, message: str, *, status: int | None = None, passing: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.passing = passing


class Client:
    """A connection to one vlmq server; a context manager."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        # Proxies are for the way out; a server given by its address is reached directly.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    # --- files ---

    def upload(self, path: Path, purpose: str, progress: Callable[[int], None]) -> Json:
        """Upload a file without holding it in memory; ``progress`` gets each block's size."""
        with open(path, "rb") as stream:
            body = _Told(stream, progress)
            files = {"file": (path.name, cast(BinaryIO, body), "application/octet-stream")}
            return self._json("POST", "/v1/files", data={"purpose": purpose}, files=files)

    def download(self, file_id: str) -> Iterator[bytes]:
        """The content of a file, block by block."""
        with self._stream("GET", f"/v1/files/{file_id}/content") as response:
            yield from response.iter_bytes(_BLOCK_BYTES)

    # --- batches ---

    def create_batch(self, file_id: str, metadata: dict[str, str]) -> Json:
        """Start a batch of chat completions over an uploaded file."""
        body: Json = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        if metadata:
            body["metadata"] = metadata
        return self._json("POST", "/v1/batches", json=body)

    def create_captions(self, body: Json) -> Json:
        """Start captioning an image set."""
        return self._json("POST", "/v1/captions", json=body)

    def batch(self, batch_id: str) -> Json:
        """One batch."""
        return self._json("GET", f"/v1/batches/{batch_id}")

    def cancel_batch(self, batch_id: str) -> Json:
        """Ask for a batch to stop."""
        return self._json("POST", f"/v1/batches/{batch_id}/cancel")

    def retry_batch(self, batch_id: str) -> Json:
        """Start a batch of the failed lines of one that has ended."""
        return self._json("POST", f"/v1/batches/{batch_id}/retry")

    @contextmanager
    def result_lines(self, batch_id: str, after: int) -> Iterator[ResultLines]:
        """The lines of a batch that are done, after that line of its input."""
        path = f"/v1/batches/{batch_id}/results"
        with self._stream("GET", path, params={"after": after}) as response:
            yield ResultLines(response)

    @contextmanager
    def rows(
        self, batch_id: str, *, after: int, limit: int, with_messages: bool
    ) -> Iterator[ResultLines]:
        """The lines of a batch that are done, flat, after that line of its input."""
        query = {"after": after, "limit": limit, "messages": "true" if with_messages else "false"}
        with self._stream("GET", f"/v1/batches/{batch_id}/rows", params=query) as response:
            yield ResultLines(response)

    @contextmanager
    def review_lines(self, batch_id: str, after: int) -> Iterator[ResultLines]:
        """Of these lines, those that the quality gate wants reviewed."""
        path = f"/v1/batches/{batch_id}/review"
        with self._stream("GET", path, params={"after": after, "limit": 10_000}) as response:
            yield ResultLines(response)

    def provenance(self, batch_id: str) -> list[Json]:
        """What the lines of a caption job came of."""
        found: list[Json] = self._json("GET", f"/v1/batches/{batch_id}/provenance")["data"]
        return found

    def batches(self, limit: int, after: str | None = None) -> Json:
        """A page of batches, newest first."""
        return self._page("/v1/batches", limit, after)

    # --- fine-tunes ---

    def create_finetune(self, body: Json) -> Json:
        """Queue a fine-tune."""
        return self._json("POST", "/v1/fine_tuning/jobs", json=body)

    def finetune(self, job_id: str) -> Json:
        """One fine-tune."""
        return self._json("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def finetunes(self, limit: int, after: str | None = None) -> Json:
        """A page of fine-tunes, newest first."""
        return self._page("/v1/fine_tuning/jobs", limit, after)

    def finetune_events(self, job_id: str, limit: int, after: str | None = None) -> Json:
        """A page of what happened to a fine-tune, newest first."""
        return self._page(f"/v1/fine_tuning/jobs/{job_id}/events", limit, after)

    def ask_finetune(self, job_id: str, wanted: Literal["cancel", "pause", "resume"]) -> Json:
        """Ask a fine-tune to stop or to go on."""
        return self._json("POST", f"/v1/fine_tuning/jobs/{job_id}/{wanted}")

    # --- chat and state ---

    def chat(self, body: Json) -> Iterator[Json]:
        """Stream a chat completion: its chunks, as they arrive."""
        request = {**body, "stream": True}
        with self._stream("POST", "/v1/chat/completions", json=request) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield _chunk(data)
        raise ServerTrouble("the answer broke off before its end; ask again", passing=True)

    def models(self) -> Json:
        """The models that the server knows."""
        return self._json("GET", "/v1/models")

    def readiness(self) -> tuple[bool, Json]:
        """Whether ``/readyz`` says yes, and what it says."""
        with self._troubles():
            response = self._http.get("/readyz")
        return response.status_code == httpx.codes.OK, _body(response)

    # --- the wire ---

    def _page(self, path: str, limit: int, after: str | None) -> Json:
        query: dict[str, str | int] = {"limit": limit}
        if after is not None:
            query["after"] = after
        return self._json("GET", path, params=query)

    def _json(self, method: str, path: str, **arguments: Any) -> Json:
        headers = {"idempotency-key": str(uuid.uuid4())} if method == "POST" else {}
        with self._troubles():
            response = self._http.request(method, path, headers=headers, **arguments)
        if response.is_error:
            raise refusal(response)
        return _body(response)

    @contextmanager
    def _stream(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        with self._troubles(), self._http.stream(method, path, **arguments) as response:
            if response.is_error:
                response.read()
                raise refusal(response)
            yield response

    @contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise ServerTrouble(
                f"nothing answers at {self.url}; is 'vlmq up' running? "
                "(another server: --url or VLMQ_URL)",
                passing=True,
            ) from None
        except httpx.TimeoutException:
            raise ServerTrouble(f"{self.url} did not answer in time", passing=True) from None
        except httpx.InvalidURL as error:
            raise ServerTrouble(f"{self.url} is not a server's address: {error}") from None
        except httpx.UnsupportedProtocol:
            raise ServerTrouble(
                f"{self.url} is not a server's address; it starts with http:// or https://"
            ) from None
        except httpx.HTTPError as error:
            raise ServerTrouble(
                f"the connection to {self.url} broke ({type(error).__name__})", passing=True
            ) from None


class ResultLines:
    """Some lines of a batch; ``next_after`` follows them, ``complete`` says that none will."""

    def __init__(self, response: httpx.Response) -> None:
        try:
            self.next_after = int(response.headers["vlmq-next-after"])
        except (KeyError, ValueError):
            raise ServerTrouble(
                f"{response.url} did not say where to go on; is it a vlmq server?"
            ) from None
        self.complete: bool = response.headers.get("vlmq-complete") == "true"
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Whole lines only: one that the connection cut off is not among them."""
        rest = b""
        for block in self._response.iter_bytes(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line + b"\n"


class _Told:
    """A file that tells how much was read of it. Offers what httpx asks of an upload."""

    def __init__(self, stream: BinaryIO, told: Callable[[int], None]) -> None:
        self._stream = stream
        self._told = told

    def read(self, size: int = -1) -> bytes:
        """Read and tell."""
        block = self._stream.read(size)
        self._told(len(block))
        return block

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(_BLOCK_BYTES):
            yield block

    def fileno(self) -> int:
        """For the size."""
        return self._stream.fileno()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Where reading goes on."""
        return self._stream.tell()


_ADVICE = {
    401: "pass a key with --api-key or VLMQ_API_KEY; 'vlmq keys create OWNER' makes one",
    429: "wait a little and try again",
}


def refusal(response: httpx.Response) -> ServerTrouble:
    """What an error response says, with what to do about it."""
    error = _body(response).get("error")
    status = response.status_code
    message = f"the server answered {status} {response.reason_phrase}"
    if isinstance(error, dict):
        message = str(error.get("message") or message)
        param = error.get("param")
        if param and str(param) not in message:
            message += f" (parameter: {param})"
    advice = _ADVICE.get(status)
    if advice:
        message += f"\n{advice}"
    return ServerTrouble(message, status=status, passing=status == 429 or status >= 500)


def _body(response: httpx.Response) -> Json:
    try:
        value = response.json()
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    if response.is_error:
        return {}
    raise ServerTrouble(f"{response.url} did not answer with JSON; is it a vlmq server?")


def _chunk(data: str) -> Json:
    try:
        value = json.loads(data)
    except ValueError:
        raise ServerTrouble("the server sent a chunk that is not JSON") from None
    if not isinstance(value, dict):
        raise ServerTrouble("the server sent a chunk that is not an object")
    error = value.get("error")
    if isinstance(error, dict):
        raise ServerTrouble(str(error.get("message")), passing=True)
    return value
