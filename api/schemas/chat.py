"""Chunks of a streamed chat answer. Structs of msgspec: many are encoded per second.

The request and the answer that is not streamed are in :mod:`shared.chat`, because batches carry
them too.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.chat import Usage


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of the one choice there is."""

    delta: dict[str, str]
    finish_reason: str | None = None
    index: int = 0
    logprobs: None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of the stream; ``usage`` is there only if the client asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
