"""Carrying an answer to its client as it is made, and noticing when the client has gone.

Nothing here knows where the answer comes from: it reads a :class:`~shared.chats.ChatReply`, and
aborts it as soon as nobody is left to read the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Self

import msgspec

from api.connection import POLL_S, Client
from api.schemas.chat import Chunk, ChunkChoice
from shared.chat import Usage
from shared.chats import ChatEnd, ChatReply
from shared.clock import unix_now
from shared.errors import QueueUnavailable, RequestAborted, VlmqError
from shared.log import get_logger
from shared.statuses import error_body

PING_S = 10.0
"""A stream that has nothing to say sends a comment this often, to meet proxies' time-outs and to
notice a client whose machine vanished without closing the connection."""
_PING = b": ping\n\n"
_DONE = b"data: [DONE]\n\n"
_log = get_logger(__name__)
_encoder = msgspec.json.Encoder()


class Reading:
    """The events of one reply, for as long as its client is there.

    Use it in a ``with`` block, or call ``close``: a reply that has not ended is then aborted.
    """

    def __init__(self, reply: ChatReply, client: Client) -> None:
        self.id = reply.id
        self._reply = reply
        self._client = client
        self._ended = False

    def next(self, patience_s: float) -> str | ChatEnd | None:
        """The next event, or None if there was none for ``patience_s``.

        Raises: RequestAborted if the client has gone; what the worker reported.
        """
        give_up_at = time.monotonic() + patience_s
        while True:
            event = self._reply.next(max(0.0, min(POLL_S, give_up_at - time.monotonic())))
            self._ended = isinstance(event, ChatEnd)
            if event is not None:
                if not self._ended:
                    self._client.check()
                return event
            self._client.check()
            if time.monotonic() >= give_up_at:
                return None

    def close(self) -> None:
        """Let go of the reply."""
        try:
            if not self._ended:
                self._reply.abort()
        except QueueUnavailable:
            # Its deadline ends the work then.
            _log.warning("abort_not_sent", completion=self.id)
        finally:
            self._reply.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def collect(reading: Reading) -> tuple[str, ChatEnd]:
    """The whole answer: its text and how it ended. Raises: as :meth:`Reading.next`."""
    parts: list[str] = []
    with reading:
        while True:
            event = reading.next(PING_S)
            if isinstance(event, ChatEnd):
                return "".join(parts), event
            if event is not None:
                parts.append(event)


class EventStream:
    """A reply as server-sent events: an iterable of frames for WSGI, which also calls ``close``.

    It waits for the first event before there is anything to iterate (at most ``PING_S``), so that
    a request that fails at once gets a proper HTTP status. A failure after that is an event with
    the error object, and no ``[DONE]`` follows.
    """

    def __init__(self, reading: Reading, *, model: str, include_usage: bool) -> None:
        self._reading = reading
        self._model = model
        self._created = unix_now()
        self._include_usage = include_usage
        try:
            self._first = reading.next(PING_S)
        except BaseException:
            reading.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._answer()
        except RequestAborted:
            _log.info("client_gone", completion=self._reading.id)
        except VlmqError as error:
            _log.warning("stream_failed", completion=self._reading.id, code=error.code)
            yield _frame(error_body(error))
        except Exception as error:  # noqa: BLE001 - the status is sent; this is all one can say
            _log.error("stream_crashed", completion=self._reading.id, exc_info=error)
            yield _frame(error_body(VlmqError()))

    def close(self) -> None:
        """Abort the reply if it has not ended; called when the response is over, however."""
        self._reading.close()

    def _answer(self) -> Iterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})
        event = self._first
        while not isinstance(event, ChatEnd):
            yield _PING if event is None else self._chunk({"content": event})
            event = self._reading.next(PING_S)
        yield self._chunk({}, event.finish_reason)
        if self._include_usage:
            yield self._usage(event)
        yield _DONE

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        return _frame(
            Chunk(
                id=self._reading.id,
                created=self._created,
                model=self._model,
                choices=[ChunkChoice(delta, finish_reason)],
                usage=None if self._include_usage else msgspec.UNSET,
            )
        )

    def _usage(self, end: ChatEnd) -> bytes:
        total = end.prompt_tokens + end.completion_tokens
        usage = Usage(end.prompt_tokens, end.completion_tokens, total)
        return _frame(Chunk(self._reading.id, self._created, self._model, [], usage))


def _frame(value: Any) -> bytes:
    return b"data: " + _encoder.encode(value) + b"\n\n"
