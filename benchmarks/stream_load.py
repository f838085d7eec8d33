"""The load of ``streams``: opens many streams at once and writes what became of them as JSON.

    python -m benchmarks.stream_load BASE_URL STREAMS ROUNDS WORDS

Each stream is a client with a connection of its own, as if from as many users. One client with a
pool of hundreds of connections looks through all of them for every request, which took longer than
the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time

import httpx
import msgspec

from benchmarks.items import MODEL

_TIMEOUT_S = 60.0


class Outcome(msgspec.Struct):
    """Seconds to the first delta of each good stream, why others failed, most open at a time."""

    first_delta_s: list[float] = []
    failures: list[str] = []
    most_open: int = 0


class _Load:
    def __init__(self, words: int) -> None:
        self._words = words
        self._open = 0
        self.outcome = Outcome()

    async def run(self, client: httpx.AsyncClient, number: int) -> None:
        """One stream, from request to ``[DONE]``."""
        text = " ".join(f"word{number}-{index}" for index in range(self._words))
        try:
            first_s, answer = await self._read(client, text)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            self.outcome.failures.append(f"{type(error).__name__}: {error}")
            return
        if answer == text:
            self.outcome.first_delta_s.append(first_s)
        else:
            self.outcome.failures.append("the answer is not whole")

    async def _read(self, client: httpx.AsyncClient, text: str) -> tuple[float, str]:
        """Seconds to the first delta, and the whole text. Raises: ValueError, httpx.HTTPError."""
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]}
        pieces: list[str] = []
        first_s, opened, done = 0.0, False, False
        start = time.perf_counter()
        try:
            async with client.stream("POST", "chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    done = done or data == "[DONE]"
                    content = "" if done or data == line else _content(data)
                    if content and not opened:
                        first_s, opened = time.perf_counter() - start, True
                        self._count(1)
                    pieces.append(content)
        finally:
            self._count(-1 if opened else 0)
        if not done:
            raise ValueError("the stream ended without [DONE]")
        return first_s, "".join(pieces)

    def _count(self, change: int) -> None:
        self._open += change
        self.outcome.most_open = max(self.outcome.most_open, self._open)


def _content(data: str) -> str:
    """The text of one event. Raises: ValueError, LookupError if it is an error or not a chunk."""
    content: str | None = json.loads(data)["choices"][0]["delta"].get("content")
    return content or ""


async def _main(base_url: str, streams: int, rounds: int, words: int) -> Outcome:
    load = _Load(words)
    tls = ssl.create_default_context()  # never used, but slow to make for each client
    for _ in range(rounds):
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, verify=tls)
                )
                for _ in range(streams)
            ]
            await asyncio.gather(*(load.run(client, n) for n, client in enumerate(clients)))
    return load.outcome


if __name__ == "__main__":
    url, *numbers = sys.argv[1:]
    result = asyncio.run(_main(url, *(int(number) for number in numbers)))
    sys.stdout.buffer.write(msgspec.json.encode(result))
