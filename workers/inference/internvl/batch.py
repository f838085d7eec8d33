"""The running batch: prompts join and leave at every step, so a short answer waits for no long one.

It knows tokens and text, no event loop: one thread calls :meth:`Batch.step` again and again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import EngineError, RequestAborted, VlmqError
from workers.inference.engines.base import Delta, Sampling

from .backbone import Backbone, Tiles
from .sampling import TokenChoice, choose
from .text import TextStream
from .tokenizer import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A prompt made ready: its ids, its tiles, and the most tokens its answer may have."""

    key: int
    ids: list[int]
    tiles: Tiles
    sampling: Sampling
    limit: int
    streamed: bool = True


Event = tuple[int, Delta | VlmqError]
"""The key of a request, and a piece of its answer or why it ended without one."""


class _Row:
    """A request being answered."""

    def __init__(self, request: Request, vocabulary: Vocabulary, ends: Collection[int]) -> None:
        self.request = request
        self.choice = TokenChoice(request.sampling, request.ids, ends)
        self.token = 0
        self._ends = ends
        self._stream = TextStream(vocabulary.decode, request.sampling.stop)
        self._count = 0
        self._waiting: list[str] = []

    def take(self, token: int) -> Delta | None:
        """Go one token further; returns what is to be shown now, if anything is."""
        if token in self._ends:
            return self._last("stop", self._stream.finish())
        self.token = token
        self._count += 1
        piece = self._stream.push(token)
        if self._stream.has_stopped():
            return self._last("stop", piece)
        if self._count >= self.request.limit:
            rest = self._stream.finish()
            return self._last("stop" if self._stream.has_stopped() else "length", piece + rest)
        if not self.request.streamed:
            self._waiting.append(piece)
            return None
        return Delta(piece) if piece else None

    def _last(self, reason: str, text: str) -> Delta:
        return Delta(
            "".join(self._waiting) + text,
            "stop" if reason == "stop" else "length",
            len(self.request.ids),
            self._count,
        )


class Batch:
    """Requests being decoded together."""

    def __init__(self, backbone: Backbone, vocabulary: Vocabulary, ends: Collection[int]) -> None:
        self._backbone = backbone
        self._vocabulary = vocabulary
        self._ends = frozenset(ends)
        self._rows: list[_Row] = []

    @property
    def size(self) -> int:
        """How many requests are being decoded."""
        return len(self._rows)

    @torch.inference_mode()
    def step(self, joining: Sequence[Request], aborted: Collection[int]) -> list[Event]:
        """Drop the aborted, take in the joining, and go one token further with every request.

        A failure ends the requests it concerns with an :class:`EngineError` event, never the
        batch's thread.
        """
        events = self._drop(aborted)
        if self._rows:
            events += self._advance()
        if joining:
            events += self._join(joining)
        return events

    def _drop(self, keys: Collection[int]) -> list[Event]:
        events: list[Event] = []
        for index in reversed(range(len(self._rows))):
            key = self._rows[index].request.key
            if key in keys:
                self._leave(index)
                events.append((key, RequestAborted()))
        return events

    def _join(self, joining: Sequence[Request]) -> list[Event]:
        try:
            rows = [_Row(request, self._vocabulary, self._ends) for request in joining]
            logits = self._backbone.join(
                [request.ids for request in joining], [request.tiles for request in joining]
            )
        except Exception as error:
            log.exception("prefill failed")
            if len(joining) > 1:  # find out whose fault it was
                return [event for request in joining for event in self._join([request])]
            return [(joining[0].key, EngineError(f"the model failed on this prompt: {error}"))]
        first = len(self._rows)
        self._rows += rows
        return self._take(logits, first)

    def _advance(self) -> list[Event]:
        try:
            logits = self._backbone.step([row.token for row in self._rows])
        except Exception as error:
            log.exception("a decoding step failed")
            failed, self._rows = self._rows, []
            self._backbone.clear()
            reason = f"the model failed while decoding: {error}"
            return [(row.request.key, EngineError(reason)) for row in failed]
        return self._take(logits, 0)

    def _take(self, logits: Tensor, first: int) -> list[Event]:
        """Choose a token for each row from ``first`` on; rows that end leave."""
        rows = self._rows[first:]
        events: list[Event] = []
        ended: list[int] = []
        tokens = choose(logits, [row.choice for row in rows])
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True), start=first):
            event = token if isinstance(token, EngineError) else row.take(token)
            if event is None:
                continue
            events.append((row.request.key, event))
            if isinstance(event, EngineError) or event.finish_reason is not None:
                ended.append(index)
        for index in reversed(ended):
            self._leave(index)
        return events

    def _leave(self, index: int) -> None:
        self._backbone.leave(index)
        last = self._rows.pop()
        if index < len(self._rows):
            self._rows[index] = last
