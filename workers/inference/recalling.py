"""Captions that need not be asked for again: known to a synced set, or given to an earlier line.

What the listing recognised is checked where it is used: a caption that the set no longer has, or an
earlier line that holds another image, only means that the image is asked about after all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from shared.batches import BatchStore, synced_set
from shared.caption_sets import Asking, Caption, CaptionSet
from shared.captions import Entry
from shared.errors import StorageFailed
from shared.jobs import BatchSpec
from shared.manifest import Manifest
from shared.results import Part
from shared.shards import output_part, read_header, shard_path
from shared.storage import Layout, storage_errors
from workers.inference.batch_lines import Line, LineExtras
from workers.inference.chunk_input import entry_lines, entry_of

FIRST_WAIT_S = 10.0
"""How long a chunk's duplicates wait at least for a first line that another process works on."""
_POLL_S = 0.1


class _Message(msgspec.Struct, frozen=True):
    content: str


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class _Body(msgspec.Struct, frozen=True):
    created: int
    choices: list[_Choice]
    usage: _Usage


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class AnswerLine(msgspec.Struct, frozen=True):
    """What is needed of an output line."""

    custom_id: str
    response: _Response
    vlmq: LineExtras | None = None

    @property
    def is_new(self) -> bool:
        """Whether it was asked for in its batch, and for itself."""
        return self.vlmq is None or self.vlmq.captioned_in is self.vlmq.same_as is None

    def caption(self, batch_id: str) -> Caption:
        """The answer, as that batch paid for it."""
        body = self.response.body
        return Caption(
            text=body.choices[0].message.content,
            finish_reason=body.choices[0].finish_reason,
            prompt_tokens=body.usage.prompt_tokens,
            completion_tokens=body.usage.completion_tokens,
            created=body.created,
            batch_id=batch_id,
            verdict=None if self.vlmq is None else self.vlmq.quality,
        )


_decoder = msgspec.json.Decoder(AnswerLine)


def decode_answer(line: bytes) -> AnswerLine:
    """Read an output line. Raises: StorageFailed if it is damaged."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageFailed(f"a line of a shard is damaged: {error}") from None


class Recalled(NamedTuple):
    """A caption that was not asked for anew, and what its line says of that."""

    caption: Caption
    extras: LineExtras


class Recall:
    """For one chunk of a synced batch. Raises: StorageFailed, QueueUnavailable.

    ``keep_going`` may raise to stop a wait.
    """

    def __init__(
        self,
        spec: BatchSpec,
        manifest: Manifest,
        layout: Layout,
        batches: BatchStore,
        keep_going: Callable[[], None],
    ) -> None:
        assert spec.source is not None, "only an image set is synced"
        assert manifest.plan.sync is not None, "the set is not synced"
        self._batch_id = spec.id
        self._manifest = manifest
        self._folder = batches.folder(spec.id)
        self._set = layout.caption_set_dir(synced_set(spec))
        self._asking = Asking(spec.source, manifest.plan.sync.model)
        self._batches = batches
        self._keep_going = keep_going
        self._began_at = time.monotonic()
        self._given_up: set[int] = set()
        """Chunks that did not come in time."""
        self._at = -1
        """The chunk that ``_lines`` and ``_entries`` are of."""
        self._entries: dict[int, Entry] = {}
        self._lines: dict[int, bytes] = {}

    def known(self, lines: Sequence[Line]) -> dict[int, Recalled]:
        """Captions from before, by line."""
        entries = ((line.number, entry_of(line)) for line in lines)
        keys = {
            number: self._asking.key(entry.content, entry.texts)
            for number, entry in entries
            if entry.known and entry.content is not None
        }
        if not keys:
            return {}
        with CaptionSet(self._set) as known:
            found = known.captions(keys.values())
        return {
            number: Recalled(caption, LineExtras(caption.verdict, captioned_in=caption.batch_id))
            for number, key in keys.items()
            if (caption := found.get(key)) is not None
        }

    def firsts(self, lines: Sequence[Line]) -> dict[int, int]:
        """The duplicates among the lines, each with the line that it is the same as."""
        entries = ((line.number, entry_of(line)) for line in lines)
        return {number: entry.same_as for number, entry in entries if entry.same_as is not None}

    def first(self, line: Line, first: int, own: Mapping[int, bytes]) -> Recalled | None:
        """The caption of the first line, for its duplicate; waits for it a while.

        ``own`` are the output lines of the duplicate's chunk. ``None``: the first has none, or is
        not the same after all.
        """
        chunk = self._manifest.chunk_of_line(first)
        if chunk == self._manifest.chunk_of_line(line.number):
            self._look_at(chunk)
            answer = own.get(first)
        else:
            answer = self._of_chunk(chunk, first)
        if answer is None or self._key(self._entries[first]) != self._key(entry_of(line)):
            return None
        decoded = decode_answer(answer)
        caption = decoded.caption(self._batch_id)
        return Recalled(caption, LineExtras(caption.verdict, same_as=decoded.custom_id))

    def _of_chunk(self, chunk: int, number: int) -> bytes | None:
        if chunk != self._at or not self._lines:
            token = self._committed(chunk)
            if token is None:
                return None
            self._look_at(chunk)
            self._lines = _output_lines(shard_path(self._folder, chunk, token))
        return self._lines.get(number)

    def _committed(self, chunk: int) -> int | None:
        # It was claimed before the duplicate's chunk, and should not take much longer.
        now = time.monotonic()
        until = now if chunk in self._given_up else now + max(FIRST_WAIT_S, now - self._began_at)
        while not (tokens := self._batches.committed_tokens(self._batch_id, chunk, 1)):
            if time.monotonic() >= until:
                self._given_up.add(chunk)
                return None
            self._keep_going()
            time.sleep(_POLL_S)
        return tokens[0]

    def _look_at(self, chunk: int) -> None:
        if chunk == self._at:
            return
        lines = entry_lines(self._manifest, self._manifest.chunk(chunk))
        self._entries = {line.number: entry_of(line) for line in lines}
        self._at, self._lines = chunk, {}

    def _key(self, entry: Entry) -> bytes | None:
        if entry.content is None:
            return None
        return self._asking.key(entry.content, entry.texts)


def _output_lines(path: Path) -> dict[int, bytes]:
    part = Part(path, *output_part(read_header(path)))
    with storage_errors(path), open(path, "rb") as stream:
        return dict(part.lines(stream))
