"""An engine without a model: it answers with the user's own words. For tests and load.

A token is a word with the white space before it; an image counts ``image_tokens``. The answer
depends on the prompt alone. With the option ``faults`` a text in the prompt makes it misbehave:
``[[echo:kill]]`` SIGKILL to this process, ``[[echo:hang]]`` no answer ever, ``[[echo:error]]`` an
EngineError, ``[[echo:bug]]`` an exception no engine should raise, ``[[echo:sick]]`` health turns
bad, ``[[echo:sleep=0.5]]`` a pause in seconds. Others change the answer: ``[[echo:blank]]`` nothing,
``[[echo:loop]]`` the same again and again, ``[[echo:refuse]]`` a refusal, ``[[echo:chinese]]`` Chinese;
with a value, such as ``[[echo:blank=0.9]]``, only below that temperature.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

import msgspec

from shared.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    EngineError,
    EngineSetupFailed,
    ImagesCutOtherwise,
    RequestAborted,
    VlmqError,
)
from workers.inference.engines.base import (
    WARM_UP_ID,
    Answer,
    Completion,
    Delta,
    EngineSpec,
    FinishReason,
    Health,
    Prompt,
    Tiling,
    complete_each,
)
from workers.inference.engines.stopping import StopStrings

_TOKEN = re.compile(r"\s*\S+")
_FOR_EVER_S = 3600.0
_FAULT = re.compile(r"\[\[echo:(?P<name>\w+)(?:=(?P<value>[0-9.]+))?\]\]")

_ANSWERS = {
    "blank": "",
    "loop": "and so on " * 20,
    "refuse": "I'm sorry, but I can't help with that image.",
    "chinese": "图中有一个红色的圆形和一个蓝色的方块。",
}
"""What is answered to a prompt that asks for it."""

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class EchoTiling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A :class:`~workers.inference.engines.base.Tiling` as configuration writes it."""

    tile_px: Annotated[int, msgspec.Meta(ge=1)]
    min_tiles: Annotated[int, msgspec.Meta(ge=1)] = 1
    max_tiles: Annotated[int, msgspec.Meta(ge=1)] = 1
    thumbnail: bool = False


class EchoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``delay_s`` is per request, ``token_delay_s`` per token, ``setup_delay_s`` while loading.

    ``tiling`` lets consumers cut images as for a model with such tiles. ``fail_with_path`` fails the
    set-up of whatever has a checkpoint. ``warm_up`` is what becomes of the host's first prompts:
    ``hang`` never answers, ``block`` does not even let the event loop go on. They have no delays.
    """

    delay_s: _Seconds = 0.0
    token_delay_s: _Seconds = 0.0
    setup_delay_s: _Seconds = 0.0
    fail_setup: bool = False
    fail_with_path: bool = False
    warm_up: Literal["answer", "fail", "hang", "block"] = "answer"
    faults: bool = False
    image_tokens: Annotated[int, msgspec.Meta(ge=0)] = 256
    tiling: EchoTiling | None = None


class EchoEngine:
    """Repeats the last user text. Raises: ConfigurationError for options it does not know."""

    def __init__(self, spec: EngineSpec) -> None:
        try:
            self._options = msgspec.convert(dict(spec.options), EchoOptions)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"echo engine, options: {error}") from None
        self._path = spec.path
        self._session_len = spec.session_len
        self._aborts: dict[int, asyncio.Event] = {}
        self._health = Health(ok=True)

    async def setup(self) -> None:
        """Wait, or fail, as the options say."""
        await asyncio.sleep(self._options.setup_delay_s)
        if self._options.fail_setup:
            raise EngineSetupFailed("the echo engine was told to fail; remove option fail_setup")
        if self._options.fail_with_path and self._path is not None:
            raise EngineSetupFailed(f"the echo engine was told to fail with {self._path}")

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """Answer word by word."""
        if prompt.id == WARM_UP_ID:
            yield await self._warm_up()
            return
        answer, finish, prompt_tokens, words = self._plan(prompt)
        stops = StopStrings(prompt.sampling.stop)
        self._aborts[prompt.id] = asyncio.Event()
        try:
            await self._pause(prompt.id, self._options.delay_s)
            await self._misbehave(prompt)
            for count, token in enumerate(_TOKEN.findall(answer), 1):
                await self._pause(prompt.id, self._options.token_delay_s)
                text, stopped = stops.push(token)
                if stopped:
                    yield Delta(text, "stop", prompt_tokens, count)
                    return
                if text:
                    yield Delta(text)
            yield Delta(stops.flush(), finish, prompt_tokens, words)
        finally:
            del self._aborts[prompt.id]

    async def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Answer at once what needs no waiting, the others in the order they finish."""
        slow = prompts
        if not self._options.delay_s and not self._options.token_delay_s:
            slow = []
            for prompt in prompts:
                if self._options.faults and _faults(prompt):
                    slow.append(prompt)
                else:
                    yield prompt.id, self._answer(prompt)
        if slow:
            async for answer in complete_each(self, slow):
                yield answer

    def tiling(self) -> Tiling | None:
        """What the option says; it looks at no image either way."""
        wanted = self._options.tiling
        if wanted is None:
            return None
        return Tiling(wanted.tile_px, wanted.min_tiles, wanted.max_tiles, wanted.thumbnail)

    def _check_tiles(self, prompt: Prompt) -> None:
        side = self._options.tiling.tile_px if self._options.tiling else 0
        if any(image.encoding == "tiles" and image.tile_px != side for image in prompt.images):
            raise ImagesCutOtherwise()

    async def abort(self, prompt_id: int) -> None:
        """End a request at its next pause."""
        if prompt_id in self._aborts:
            self._aborts[prompt_id].set()

    def hurry(self, hurried: bool) -> None:  # noqa: FBT001 - a state, not an option
        """No prompt waits for others."""

    def health(self) -> Health:
        """Good, until a fault says otherwise."""
        return self._health

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _warm_up(self) -> Delta:
        match self._options.warm_up:
            case "fail":
                raise EngineError("the echo engine was told to fail its first prompt")
            case "hang":
                await asyncio.Event().wait()
            case "block":
                time.sleep(_FOR_EVER_S)  # noqa: ASYNC251 - the fault is that it blocks
        return Delta("", "stop", 1, 1)

    def _answer(self, prompt: Prompt) -> Completion | VlmqError:
        """The whole answer, without a pause."""
        try:
            text, finish, prompt_tokens, words = self._plan(prompt)
            if not prompt.sampling.stop:
                return Completion(text, finish, prompt_tokens, words)
            return _cut_at_stop(text, finish, prompt_tokens, prompt.sampling.stop)
        except VlmqError as error:
            return error

    def _plan(self, prompt: Prompt) -> tuple[str, FinishReason, int, int]:
        """The answer but for stop strings, why it ends, the prompt's tokens and the answer's."""
        self._check_tiles(prompt)
        prompt_tokens = len(prompt.images) * self._options.image_tokens
        for turn in prompt.turns:
            for part in turn.parts:
                if isinstance(part, str):
                    prompt_tokens += len(part.split())
        room = self._session_len - prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens, images included; "
                f"the model's session length is {self._session_len}"
            )
        text = _last_user_text(prompt)
        if self._options.faults:
            text = _instead(prompt, text)
        words = len(text.split())
        limit = min(room, prompt.sampling.max_tokens)
        if words > limit:
            return "".join(_TOKEN.findall(text.rstrip())[:limit]), "length", prompt_tokens, limit
        return text.rstrip(), "stop", prompt_tokens, words

    async def _pause(self, prompt_id: int, pause_s: float | None) -> None:
        """Wait that long (None: for ever), or raise RequestAborted when told to stop."""
        abort = self._aborts[prompt_id]
        if pause_s != 0 and not abort.is_set():
            try:
                async with asyncio.timeout(pause_s):
                    await abort.wait()
            except TimeoutError:
                return
        if abort.is_set():
            raise RequestAborted()

    async def _misbehave(self, prompt: Prompt) -> None:
        if not self._options.faults:
            return
        for name, value in _faults(prompt):
            match name:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    await self._pause(prompt.id, None)
                case "error":
                    raise EngineError("the prompt asked the echo engine for an error")
                case "bug":
                    raise RuntimeError("the prompt asked the echo engine for a bug")
                case "sick":
                    self._health = Health(ok=False, detail="the prompt made the echo engine sick")
                case "sleep":
                    await self._pause(prompt.id, float(value))
                case _ if name not in _ANSWERS:
                    raise EngineError(f"the echo engine knows no fault '{name}'")


def _last_user_text(prompt: Prompt) -> str:
    for turn in reversed(prompt.turns):
        if turn.role == "user":
            return "".join([part for part in turn.parts if type(part) is str])
    return ""


def _faults(prompt: Prompt) -> list[tuple[str, str]]:
    """The faults that a prompt asks for, as (name, value)."""
    return _FAULT.findall(_last_user_text(prompt))


def _instead(prompt: Prompt, text: str) -> str:
    """What is answered in place of the text, if it asks for that."""
    for name, value in _faults(prompt):
        if name in _ANSWERS and not (value and prompt.sampling.temperature >= float(value)):
            return _ANSWERS[name]
    return text


def _cut_at_stop(
    answer: str, finish: FinishReason, prompt_tokens: int, stop: list[str]
) -> Completion:
    stops = StopStrings(stop)
    texts: list[str] = []
    tokens = _TOKEN.findall(answer)
    for count, token in enumerate(tokens, 1):
        text, stopped = stops.push(token)
        texts.append(text)
        if stopped:
            return Completion("".join(texts), "stop", prompt_tokens, count)
    return Completion("".join(texts) + stops.flush(), finish, prompt_tokens, len(tokens))
