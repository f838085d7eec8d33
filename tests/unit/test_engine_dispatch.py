"""When batches are told to send nothing more: an engine in this process, no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from shared.errors import EngineError, VlmqError
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
        self.hurried: list[bool] = []
        self.speechless = False
        """Whether it fails where it should have its first word."""

    def let(self, prompt_id: int) -> None:
        """Let this prompt have its word."""
        self.words[prompt_id].set()

    async def setup(self) -> None:
        """Nothing to load."""

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """One word, and another."""
        self.words[prompt.id] = asyncio.Event()
        await self.words[prompt.id].wait()
        if self.speechless:
            raise EngineError("no word")
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

    def hurry(self, hurried: bool) -> None:
        """Remembered."""
        self.hurried.append(hurried)

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

    async def submit(
        self,
        caller: Someone,
        lane: Lane,
        ids: Sequence[int],
        size: int,
        mode: Mode | None = None,
    ) -> None:
        """Ask, and let the loop turn."""
        prompts = [
            Prompt(number, [Turn("user", [0])], Sampling(), [Image(bytes(size))]) for number in ids
        ]
        mode = mode or ("stream" if lane == "chat" else "whole")
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


def test_a_chat_that_is_announced_holds_batches_back_as_one_that_waits() -> None:
    """Before it is asked for, or while a neighbour answers it; taken back, batches go on."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(7), 1)
        desk.dispatcher.chats_wait(desk.chat, 1)
        assert (desk.told, desk.engine.hurried) == ([True], [True])
        desk.dispatcher.chats_wait(desk.chat, 0)
        assert (desk.told, desk.engine.hurried) == ([True, False], [True, False])
        await desk.close()

    asyncio.run(scenario())


def test_an_announced_chat_holds_nothing_back_that_the_engine_needs() -> None:
    """With too little waiting the batch is read on; the engine hurries all the same."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(5), 1)
        desk.dispatcher.chats_wait(desk.chat, 1)
        assert (desk.told, desk.engine.hurried) == ([], [True])
        await desk.close()

    asyncio.run(scenario())


def test_who_leaves_takes_its_announcement_along() -> None:
    """Its chats are nobody's now; those of others still count."""

    async def scenario() -> None:
        desk = Desk()
        other = Someone()
        desk.dispatcher.join(other)
        await desk.submit(desk.batch, "batch", range(7), 1)
        desk.dispatcher.chats_wait(desk.chat, 2)
        desk.dispatcher.chats_wait(other, 1)
        desk.dispatcher.leave(desk.chat)
        assert (desk.told, desk.engine.hurried) == ([True], [True])
        desk.dispatcher.leave(other)
        assert (desk.told, desk.engine.hurried) == ([True, False], [True, False])
        await desk.close()

    asyncio.run(scenario())


def test_who_leaves_with_a_chat_without_a_word_leaves_no_hurry() -> None:
    """Announced and asked for: both go."""

    async def scenario() -> None:
        desk = Desk()
        desk.dispatcher.chats_wait(desk.chat, 1)
        await desk.submit(desk.chat, "chat", [0], 1)
        desk.dispatcher.leave(desk.chat)
        await desk.turn()
        assert desk.engine.hurried == [True, False]
        assert desk.dispatcher.load() == Load(0, 0)

    asyncio.run(scenario())


def test_the_engine_hears_of_hurry_once_and_not_of_every_chat() -> None:
    """Announced, counted up and down, asked for and heard: it is one time of waiting."""

    async def scenario() -> None:
        desk = Desk()
        for count in (1, 2, 3, 2):
            desk.dispatcher.chats_wait(desk.chat, count)
        await desk.submit(desk.chat, "chat", [0, 1], 1)
        await desk.let(1)
        desk.dispatcher.chats_wait(desk.chat, 1)
        await desk.let(2)
        assert desk.engine.hurried == [True]
        desk.dispatcher.chats_wait(desk.chat, 0)
        assert desk.engine.hurried == [True, False]
        desk.dispatcher.chats_wait(desk.chat, 0)
        assert desk.engine.hurried == [True, False]
        desk.dispatcher.chats_wait(desk.chat, 1)
        assert desk.engine.hurried == [True, False, True]
        await desk.close()

    asyncio.run(scenario())


def test_a_chat_that_nobody_announced_hurries_the_engine_too() -> None:
    """Until its first word, whatever others announce and take back meanwhile."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.chat, "chat", [0], 1)
        assert desk.engine.hurried == [True]
        desk.dispatcher.chats_wait(desk.batch, 1)
        desk.dispatcher.chats_wait(desk.batch, 0)
        assert desk.engine.hurried == [True]
        await desk.let(1)
        assert desk.engine.hurried == [True, False]
        await desk.close()
        assert desk.engine.hurried == [True, False]

    asyncio.run(scenario())


def test_a_batch_hurries_nobody() -> None:
    """It waits for no word."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.batch, "batch", range(7), 1)
        await desk.close()
        assert desk.engine.hurried == []

    asyncio.run(scenario())


@pytest.mark.parametrize("mode", ["stream", "whole"])
def test_a_chat_that_is_given_up_ends_the_hurry(mode: Mode) -> None:
    """It has had no word and never will."""

    async def scenario() -> None:
        desk = Desk()
        await desk.submit(desk.chat, "chat", [0], 1, mode)
        assert desk.engine.hurried == [True]
        desk.dispatcher.abort(desk.chat, [0])
        await desk.turn()
        assert desk.engine.hurried == [True, False]
        await desk.dispatcher.close()

    asyncio.run(scenario())


def test_a_chat_that_fails_without_a_word_ends_the_hurry() -> None:
    """The engine's error is its answer."""

    async def scenario() -> None:
        desk = Desk()
        desk.engine.speechless = True
        await desk.submit(desk.chat, "chat", [0], 1)
        assert desk.engine.hurried == [True]
        await desk.let(1)
        assert desk.engine.hurried == [True, False]
        assert desk.chat.answered == 1

    asyncio.run(scenario())


def test_what_is_announced_keeps_no_batch_from_its_end() -> None:
    """A caller may announce chats and never ask: every prompt of the batch is answered."""

    async def scenario() -> None:
        desk = Desk()
        desk.dispatcher.chats_wait(desk.chat, 1)
        await desk.submit(desk.batch, "batch", range(20), 1)
        while desk.dispatcher.load() != Load(0, 0):
            await desk.let(*desk.engine.words)
            await asyncio.sleep(0.001)
        assert desk.batch.answered == 20
        assert desk.told == [True, False]

    asyncio.run(scenario())
