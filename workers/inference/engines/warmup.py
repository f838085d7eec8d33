"""The first prompts of a loaded engine: what cannot answer them must not be called ready.

One text, and one text with an image unless the engine refuses images as invalid.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import EngineSetupFailed, InvalidRequest, VlmqError
from workers.inference.engines.base import (
    WARM_UP_ID,
    Engine,
    Image,
    Prompt,
    Sampling,
    Tiling,
    Turn,
    as_engine_error,
    collect,
)

BLOCKED_GRACE_S = 5.0
"""How much longer a blocked event loop has than one that merely waits."""

_SIDE = 32
_PICTURE = Image(
    # A grey square of _SIDE pixels, so that no engine process needs Pillow for it.
    base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKElEQVR42u3NQQEAAAQEMCS/6Erw2wqs"
        "k9SnqWcCgUAgEAgEAoHgygK+PQHAs0oJIwAAAABJRU5ErkJggg=="
    ),
    "file",
    _SIDE,
    _SIDE,
    "low",
)
_SAMPLING = Sampling(max_tokens=4, temperature=0)


async def warm_up(engine: Engine, limit_s: float, exit_status: int) -> None:
    """Have the engine answer its first prompts within ``limit_s`` seconds.

    If the engine blocks the event loop, so that nothing here can run, the process ends with
    ``exit_status`` a little later.

    Raises: EngineSetupFailed with what went wrong.
    """
    text = Prompt(WARM_UP_ID, [Turn("user", ["Hello"])], _SAMPLING)
    picture = _picture(engine.tiling())
    image = Prompt(WARM_UP_ID, [Turn("user", [0, "Hello"])], _SAMPLING, [picture])
    with _guard(limit_s, exit_status):
        try:
            async with asyncio.timeout(limit_s):
                await _answer(engine, text, "a text")
                await _answer(engine, image, "an image", optional=True)
        except TimeoutError:
            raise EngineSetupFailed(_silent(limit_s)) from None


def _picture(tiling: Tiling | None) -> Image:
    """A grey square, in the form in which consumers would send it."""
    if tiling is None or tiling.min_tiles > 1:
        return _PICTURE
    side = tiling.tile_px
    return Image(b"\x80" * (side * side * 3), "tiles", side, side, tile_px=side)


async def _answer(engine: Engine, prompt: Prompt, what: str, *, optional: bool = False) -> None:
    try:
        await collect(engine, prompt)
    except TimeoutError:
        raise
    except Exception as error:
        if optional and isinstance(error, InvalidRequest):
            return  # a model without eyes says so, and is told no images
        reason: VlmqError = as_engine_error(error)
        raise EngineSetupFailed(
            f"the model was loaded, but failed on its first prompt with {what}: {reason.message}"
        ) from error


def _silent(limit_s: float) -> str:
    return (
        f"the model was loaded, but did not answer its first prompts within {limit_s:g} s; "
        "if it only needs longer, raise node.warm_up_limit_s"
    )


@contextmanager
def _guard(limit_s: float, exit_status: int) -> Iterator[None]:
    def give_up() -> None:
        sys.stderr.write(f"{_silent(limit_s)}\n")
        sys.stderr.flush()
        os._exit(exit_status)

    timer = threading.Timer(limit_s + BLOCKED_GRACE_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
