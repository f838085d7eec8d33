"""When batches are told to send nothing more: an engine in this process, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from shared.errors import VlmqError
from workers.inference.engines.base import (
    Answer,
    Completion,
    Delta,
    Health,
    Image,
    Prompt,
    Sampling,
    Tiling,
    Turn,
)
from workers.inference.engines.dispatch import Dispatcher
from workers.inference.engines.wire import Lane, Load, Mode, Submit

MAX_RUNNING, MAX_WAITING, LIMIT = 4, 100, 1000


class Obedient:
    """An engine that answers what the test lets it."""

    def __init__(self) -> None:
        self.words: dict[int, asyncio.Event] = {}

    def let(self, prompt_id: int) -> None:
        """Let this prompt have its word."""
        self.words[prompt_id].set()

    async def setup(self) -> None:
        """Nothing to load."""

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """One word, and another."""
        self.words[prompt.id] = asyncio.Event()
        await self.words[prompt.id].wait()
        yield Delta("word")
        self.words[prompt.id].clear()
        await self.words[prompt.id].wait()
        yield Delta(" end", "stop", 1, 2)

    async def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Each when it is let."""
        for prompt in prompts:
            self.words[prompt.id] = asyncio.Event()
        for prompt in prompts:
            await self.words[prompt.id].wait()
            yield prompt.id, Completion("word", "stop", 1, 1)

    def tiling(self) -> Tiling | None:
        """Files."""
        return None

    async def abort(self, prompt_id: int) -> None:
        """Let it go on."""
        self.let(prompt_id)

    def health(self) -> Health:
        """Well."""
        return Health(ok=True)

    async def close(self) -> None:
        """Nothing to let go of."""


class Someone:
    """A caller that counts its answers."""

    def __init__(self) -> None:
        self.answered = 0

    def delta(self, prompt_id: int, text: str) -> None:
        """Not counted."""

    def done(self, prompt_id: int, completion: Completion) -> None:
        """Counted."""
        self.answered += 1

    def failed(self, prompt_id: int, error: VlmqError) -> None:
        """Counted."""
        self.answered += 1


class Desk:
    """A dispatcher, its engine, and what it told batches."""

    def __init__(self) -> None:
        self.engine = Obedient()
        self.told: list[bool] = []
        self.dispatcher = Dispatcher(
            self.engine,
            MAX_RUNNING,
            MAX_WAITING,
            max_waiting_bytes=LIMIT,
            on_enough=self.told.append,
        )
        self.batch, self.chat = Someone(), Someone()
        self.dispatcher.join(self.batch)
        self.dispatcher.join(self.chat)

    async def submit(self, caller: Someone, lane: Lane, ids: Sequence[int], size: int) -> None:
        """Ask, and let the loop turn."""
        prompts = [
            Prompt(number, [Turn("user", [0])], Sampling(), [Image(bytes(size))]) for number in ids
        ]
        mode: Mode = "stream" if lane == "chat" else "whole"
        self.dispatcher.submit(caller, Submit(prompts, mode, lane))
        await self.turn()

    async def turn(self) -> None:
        """Whatever can go on goes on."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Let everything end."""
        while self.engine.words.keys() and self.dispatcher.load() != Load(0, 0):
            await self.let(*self.engine.words)

    async def let(self, *ids: int) -> None:
        """Let prompts have their words."""
        for number in ids:
            self.engine.let(number)
        await self.turn()


def test_batches_are_held_at_the_bound_and_released_at_its_half() -> None:
    """Three run; of those that wait, each of 300 bytes, four are too many and one is few enough."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(6), 300)
        assert desk.told == []
        await desk.submit(desk.batch, "batch", [6], 300)
        assert desk.told == [True]
        await desk.let(1, 2)
        assert desk.told == [True]
        await desk.let(3)
        assert desk.told == [True, False]
        await desk.close()

    asyncio.run(scenario())


def test_batches_are_held_while_a_chat_waits_for_its_word_and_work_is_left() -> None:
    """Four prompts wait for the engine, so a chat may have its time; heard, batches go on."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(7), 1)
        await desk.submit(desk.chat, "chat", [0], 1)
        assert desk.told == [True]
        await desk.let(8)
        assert desk.told == [True, False]
        await desk.let(8)
        assert desk.chat.answered == 1
        await desk.close()

    asyncio.run(scenario())


def test_a_chat_holds_nothing_back_that_the_engine_needs() -> None:
    """With too little waiting, the batch is read on while the chat waits."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(5), 1)
        await desk.submit(desk.chat, "chat", [0], 1)
        assert desk.told == []
        await desk.close()

    asyncio.run(scenario())


def test_what_is_taken_back_or_refused_counts_no_more() -> None:
    """Aborted while it waited, or never let in: the bound is free again."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(8), 300)
        assert desk.told == [True]
        desk.dispatcher.abort(desk.batch, range(3, 8))
        assert desk.told == [True, False]
        await desk.submit(desk.batch, "batch", range(10, 10 + MAX_WAITING + 50), 1)
        assert desk.batch.answered == 50
        assert desk.told == [True, False]
        await desk.close()

    asyncio.run(scenario())
