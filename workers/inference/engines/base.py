"""The engine contract: what a model behind vlmq must do, and the words it is asked in.

An engine is set up once and asked many times. It knows nothing of jobs, leases, HTTP or Redis: it
gets prompts with verified images and gives text. ``host`` runs it as a process of its own;
``client`` talks to that process. A new engine is one module with one class, named in the node's
configuration as ``module:Class`` or by a short name in ``host.ENGINES``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from shared.errors import EngineError, VlmqError

FinishReason = Literal["stop", "length"]


Detail = Literal["auto", "low", "high"]
"""OpenAI's word for how closely an image is looked at; ``low`` is one tile."""


class Image(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One verified image.

    ``encoding`` says what ``data`` is: ``file``, a whole JPEG, PNG, … file, verified to its last
    pixel; ``rgb``, ``width * height * 3`` bytes, row by row; ``tiles``, the tiles that the
    engine's :class:`Tiling` asks for, ``tile_px * tile_px * 3`` bytes each, row by row of the grid,
    the thumbnail last. ``width`` and ``height`` are those of the upright image, in pixels;
    ``source_bytes`` is the size of the file it came from, for whoever limits that; ``tile_px`` the
    side of the tiles, without which 16 small ones could be taken for one large one.
    """

    data: bytes
    encoding: Literal["file", "rgb", "tiles"] = "file"
    width: int = 0
    height: int = 0
    detail: Detail = "auto"
    source_bytes: int = 0
    tile_px: int = 0


class Tiling(msgspec.Struct, frozen=True, array_like=True):
    """How a model cuts an image into square tiles of ``tile_px`` pixels a side.

    The grid of ``min_tiles`` to ``max_tiles`` whose shape is closest to the image's, and with
    ``thumbnail``, if there is more than one tile, the whole image once more as a last tile.
    """

    tile_px: int
    min_tiles: int = 1
    max_tiles: int = 1
    thumbnail: bool = False


class Turn(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message of a conversation; a part is a text or an index into ``Prompt.images``."""

    role: Literal["system", "user", "assistant"]
    parts: list[str | int]


class Sampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 mean off."""

    max_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 40
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: list[str] = []
    seed: int | None = None


class Prompt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request to an engine. ``id`` is unique among the requests an engine has at a time."""

    id: int
    turns: list[Turn]
    sampling: Sampling
    images: list[Image] = []


WARM_UP_ID = 2**31 - 1
"""The id of the prompts by which a host tries an engine that was just loaded."""


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A piece of an answer. The last one, and only it, has a ``finish_reason`` and the counts.

    ``prompt_tokens`` counts image tokens too. A stop string is never part of ``text``.
    """

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completion(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A whole answer, as batches want it."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class Health(msgspec.Struct, frozen=True, array_like=True):
    """What an engine says of itself."""

    ok: bool
    detail: str = ""


class EngineSpec(msgspec.Struct, frozen=True):
    """What an engine is started with.

    ``options`` are the engine's own (for ``echo``: delays and faults), checked by the engine;
    ``session_len`` is in tokens; ``max_running`` is how many requests it should work on at once;
    ``memory_share`` (0 to 1) is the part of each of its GPUs' total memory that this process may
    use in all, weights included (None: as it likes).
    """

    model: str
    path: str | None = None
    trust_remote_code: bool = False
    session_len: int = 8192
    max_running: int = 32
    options: Mapping[str, Any] = {}
    memory_share: float | None = None


class Engine(Protocol):
    """What every engine does. All methods run on one event loop and must not block it for long."""

    async def setup(self) -> None:
        """Load the model. Raises :class:`~shared.errors.EngineSetupFailed` with what to do next."""
        ...

    def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """Answer one prompt.

        Bad input raises a :class:`~shared.errors.VlmqError` before the first delta and leaves all
        other requests alone. Closing the iterator aborts the request.
        """
        ...

    def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Answer many prompts, each whole, in any order; failures are answers too.

        :func:`complete_each` is the plain way; an engine with a cheaper one offers its own.
        """
        ...

    def tiling(self) -> Tiling | None:
        """How images may be cut for this engine beforehand; None if it wants them as files.

        Asked after ``setup``. An engine that answers with a tiling takes files all the same, and
        answers tiles of another side with :class:`~shared.errors.ImagesCutOtherwise`.
        """
        ...

    async def abort(self, prompt_id: int) -> None:
        """Stop working on a prompt; unknown ids are ignored.

        Its ``generate`` then raises :class:`~shared.errors.RequestAborted`, and ``complete``
        yields that as its answer.
        """
        ...

    def hurry(self, hurried: bool) -> None:  # noqa: FBT001 - a state, not an option
        """A chat waits for its first word, or none does any more: told at each change.

        An engine that makes prompts wait until there are many to begin with should not meanwhile;
        others do nothing.
        """
        ...

    def health(self) -> Health:
        """Say whether the engine can work."""
        ...

    async def close(self) -> None:
        """Let go of the model. The host calls it when no request is left."""
        ...


Answer = tuple[int, Completion | VlmqError]
"""The id of a prompt and what became of it."""


async def let_go(iterator: AsyncIterator[Any]) -> None:
    """Close an iterator now rather than when it is collected, so that its request is aborted."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


def as_engine_error(error: Exception) -> VlmqError:
    """What a client hears of an exception that came out of an engine."""
    if isinstance(error, VlmqError):
        return error
    return EngineError(f"the engine failed on this request: {type(error).__name__}: {error}")


async def collect(engine: Engine, prompt: Prompt) -> Completion:
    """Join the deltas of one prompt into its completion."""
    texts: list[str] = []
    deltas = engine.generate(prompt)
    try:
        async for delta in deltas:
            texts.append(delta.text)
            if delta.finish_reason is not None:
                return Completion(
                    "".join(texts),
                    delta.finish_reason,
                    delta.prompt_tokens,
                    delta.completion_tokens,
                )
    finally:
        await let_go(deltas)
    raise EngineError(f"the engine ended request {prompt.id} without a finish reason")


async def complete_each(engine: Engine, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
    """Answer every prompt through ``engine.generate`` at once, in the order they finish."""

    async def answer(prompt: Prompt) -> Answer:
        try:
            return prompt.id, await collect(engine, prompt)
        # One prompt's failure must not become its neighbours'.
        except Exception as error:  # noqa: BLE001
            return prompt.id, as_engine_error(error)

    tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
