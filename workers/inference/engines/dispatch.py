"""Between the callers of an engine process and its engine: admission, answers, aborts.

Knows the engine and the lanes, but no sockets: a caller is anything that takes deltas, answers and
failures. Prompts asked for whole go to ``engine.complete`` one admitted group at a time, so that
an engine with a cheap way to answer many pays no task per prompt; streamed ones get a task each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from shared.errors import EngineBusy, EngineError, EngineUnavailable, VlmqError
from shared.log import get_logger
from workers.inference.engines.base import (
    Completion,
    Engine,
    Prompt,
    as_engine_error,
    let_go,
)
from workers.inference.engines.lanes import Lanes
from workers.inference.engines.wire import Lane, Load, MalformedFrame, Submit

log = get_logger(__name__)

ABORT_AGAIN_S = 0.05
ADMIT_AGAIN_S = 0.005
"""How soon to look again for what the pace held back."""
MAX_WAITING_BYTES = 256 * 1024 * 1024
"""Images of waiting batch prompts may hold about so much memory; some seconds of work."""


class Caller(Protocol):
    """Who asked. ``prompt_id`` is the caller's own."""

    def delta(self, prompt_id: int, text: str) -> None:
        """A piece of a streamed answer."""
        ...

    def done(self, prompt_id: int, completion: Completion) -> None:
        """The answer, or its last piece if it was streamed."""
        ...

    def failed(self, prompt_id: int, error: VlmqError) -> None:
        """There will be no answer."""
        ...


class _Request(msgspec.Struct, eq=False):
    """A prompt under its process-wide id; ``caller`` is None once nobody waits for it.

    ``unheard`` is a chat in the engine that has no word yet; ``entered_s`` is of ``time.monotonic``.
    ``size_bytes`` counts the images of a batch prompt; those of chats are not bounded here.
    """

    prompt: Prompt
    caller: Caller | None
    caller_id: int
    lane: Lane
    streamed: bool
    size_bytes: int
    started: bool = False
    released: bool = False
    unheard: bool = False
    entered_s: float = 0.0
    task: asyncio.Task[None] | None = None


class Dispatcher:
    """Lets prompts into the engine and hands their answers back to the callers.

    ``on_enough`` is told when batches should send nothing more for now, and when they should again:
    their prompts are large, and whoever takes them in has no time for chats meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        max_running: int,
        max_waiting: int,
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        on_enough: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._lanes: Lanes[_Request] = Lanes(max_running, max_waiting)
        self._max_running = max_running
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._unheard = 0
        self._announced: dict[Caller, int] = {}
        self._chats = 0
        self._enough = False
        self._on_enough = on_enough
        self._requests: dict[Caller, dict[int, _Request]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_id = 0
        self._accepting = True
        self._admission_due = False
        self._admit_later: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    def load(self) -> Load:
        """What runs and what waits."""
        return Load(self._lanes.running, self._lanes.waiting)

    def join(self, caller: Caller) -> None:
        """Accept prompts of this caller from now on."""
        self._requests[caller] = {}

    def leave(self, caller: Caller) -> None:
        """Abort everything this caller asked for."""
        self.abort(caller, list(self._requests[caller]))
        del self._requests[caller]
        self.chats_wait(caller, 0)

    def submit(self, caller: Caller, message: Submit) -> None:
        """Queue prompts; those beyond the bound fail with EngineBusy.

        Raises: MalformedFrame if an id is already in use.
        """
        if not self._accepting:
            for prompt in message.prompts:
                caller.failed(prompt.id, _stopping())
            return
        requests = self._register(caller, message)
        self._waiting_bytes += _size(requests)
        refused = self._lanes.offer(message.lane, requests)
        self._waiting_bytes -= _size(refused)
        for request in refused:
            self._answer(request, EngineBusy())
        self._admit()

    def chats_wait(self, caller: Caller, count: int) -> None:
        """So many chats of this caller wait for their first word, here or at a neighbour.

        It may say so before it asks, so that the engine is ready for them.
        """
        if count:
            self._announced[caller] = count
        else:
            self._announced.pop(caller, None)
        self._count_chats()

    def abort(self, caller: Caller, ids: Iterable[int]) -> None:
        """Forget prompts: waiting ones leave at once, running ones when the engine lets go."""
        mine = self._requests[caller]
        gone = [request for i in ids if (request := mine.pop(i, None)) is not None]
        for request in gone:
            request.caller = None
        if any(not request.started for request in gone):
            self._withdraw(lambda request: request.caller is None)
        in_groups: list[_Request] = []
        for request in gone:
            if request.task is not None:
                request.task.cancel()
            elif request.started:
                in_groups.append(request)
        if in_groups:
            self._spawn(self._abort_in_engine(in_groups))

    def close_door(self) -> None:
        """Take nothing new, and fail what has not started, with EngineUnavailable."""
        self._accepting = False
        for request in self._withdraw(lambda _: True):
            self._answer(request, _stopping())

    async def until_empty(self) -> None:
        """Return when the engine works on nothing."""
        await self._empty.wait()

    def fail_all(self, error: VlmqError) -> None:
        """Give up everything, running or not, with this error."""
        self._accepting = False
        for caller, mine in self._requests.items():
            for caller_id in mine:
                caller.failed(caller_id, error)
            self.abort(caller, list(mine))

    async def close(self) -> None:
        """Cancel the tasks that are left and wait for them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _register(self, caller: Caller, message: Submit) -> list[_Request]:
        mine = self._requests[caller]
        lane, streamed = message.lane, message.mode == "stream"
        next_id = self._last_id + 1
        self._last_id += len(message.prompts)
        requests: list[_Request] = []
        bounded = lane == "batch"
        for engine_id, prompt in enumerate(message.prompts, next_id):
            caller_id = prompt.id
            if caller_id in mine:
                raise MalformedFrame(f"prompt id {caller_id} is in use on this connection")
            # The prompt was decoded a moment ago and nobody else holds it.
            msgspec.structs.force_setattr(prompt, "id", engine_id)
            size_bytes = 0
            if bounded and prompt.images:
                size_bytes = sum(len(image.data) for image in prompt.images)
            request = _Request(prompt, caller, caller_id, lane, streamed, size_bytes)
            mine[caller_id] = request
            requests.append(request)
        return requests

    def _admit(self) -> None:
        self._admission_due = False
        admitted = self._lanes.take()
        if self._lanes.held_back and self._admit_later is None:
            loop = asyncio.get_running_loop()
            self._admit_later = loop.call_later(ADMIT_AGAIN_S, self._admit_again)
        if not self._lanes.running:
            self._empty.set()
        self._waiting_bytes -= _size(admitted)
        if admitted:
            self._empty.clear()
            self._begin(admitted)
        self._tell_enough()

    def _begin(self, admitted: Sequence[_Request]) -> None:
        whole: dict[int, _Request] = {}
        now_s = time.monotonic()
        for request in admitted:
            request.started, request.entered_s = True, now_s
            if request.lane == "chat":
                request.unheard = True
                self._unheard += 1
                self._count_chats()
            if request.streamed:
                self._start_stream(request)
            else:
                whole[request.prompt.id] = request
        if whole:
            self._spawn(self._complete(whole))

    def _admit_again(self) -> None:
        self._admit_later = None
        self._admit()

    def _start_stream(self, request: _Request) -> None:
        request.task = self._spawn(self._stream(request))
        # Not in the task's own `finally`: a task cancelled before its first step never gets there.
        request.task.add_done_callback(lambda _: self._release(request))

    async def _stream(self, request: _Request) -> None:
        deltas = self._engine.generate(request.prompt)
        try:
            async for delta in deltas:
                self._hear(request)
                if delta.finish_reason is not None:
                    last = Completion(
                        delta.text,
                        delta.finish_reason,
                        delta.prompt_tokens,
                        delta.completion_tokens,
                    )
                    self._answer(request, last)
                    return
                if request.caller is not None and delta.text:
                    request.caller.delta(request.caller_id, delta.text)
            self._answer(request, _no_answer())
        except Exception as error:  # noqa: BLE001 - an engine's bug is one request's failure
            self._answer(request, _failure(error))
        finally:
            await let_go(deltas)

    async def _complete(self, group: dict[int, _Request]) -> None:
        answers = self._engine.complete([request.prompt for request in group.values()])
        error: VlmqError = _no_answer()
        try:
            async for engine_id, answer in answers:
                request = group.pop(engine_id)
                self._answer(request, answer)
                self._release(request)
        except Exception as caught:  # noqa: BLE001 - as in _stream, for a group
            error = _failure(caught)
        finally:
            for request in group.values():
                self._answer(request, error)
                self._release(request)
            await let_go(answers)

    async def _abort_in_engine(self, requests: list[_Request]) -> None:
        """Tell the engine until it lets go: it may not have looked at a prompt yet."""
        while requests:
            for request in requests:
                await self._engine.abort(request.prompt.id)
            await asyncio.sleep(ABORT_AGAIN_S)
            requests = [request for request in requests if not request.released]

    def _answer(self, request: _Request, answer: Completion | VlmqError) -> None:
        caller, caller_id = request.caller, request.caller_id
        if caller is None:
            return
        request.caller = None
        del self._requests[caller][caller_id]
        if isinstance(answer, Completion):
            caller.done(caller_id, answer)
        else:
            caller.failed(caller_id, answer)

    def _hear(self, request: _Request) -> None:
        if request.unheard:
            request.unheard = False
            self._unheard -= 1
            self._count_chats()

    def _count_chats(self) -> None:
        # Callers that announce their chats count them as long as we do, others not at all.
        chats = max(self._unheard, sum(self._announced.values()))
        if chats == self._chats:
            return
        hurried, self._chats = self._chats > 0, chats
        self._lanes.chats_wait(chats)
        if hurried != (chats > 0):
            self._engine.hurry(chats > 0)
        self._tell_enough()

    def _withdraw(self, unwanted: Callable[[_Request], bool]) -> list[_Request]:
        removed = self._lanes.withdraw(unwanted)
        self._waiting_bytes -= _size(removed)
        self._tell_enough()
        return removed

    def _tell_enough(self) -> None:
        """Enough waits: as much as may, until half of it is gone; or a chat, and some for later."""
        most = self._max_waiting_bytes // 2 if self._enough else self._max_waiting_bytes
        chat = self._chats > 0 and self._lanes.waiting >= self._max_running
        enough = self._waiting_bytes > most or chat
        if enough != self._enough:
            self._enough = enough
            self._on_enough(enough)

    def _release(self, request: _Request) -> None:
        request.released = True
        self._hear(request)
        self._lanes.release(request.lane, time.monotonic() - request.entered_s)
        # Once per turn of the loop: prompts that finish together let a group in together.
        if not self._admission_due:
            self._admission_due = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _size(requests: Iterable[_Request]) -> int:
    return sum(request.size_bytes for request in requests)


def _stopping() -> EngineUnavailable:
    return EngineUnavailable("the engine process is stopping")


def _no_answer() -> EngineError:
    return EngineError("the engine ended this request without an answer")


def _failure(error: Exception) -> VlmqError:
    if not isinstance(error, VlmqError):
        log.error("engine raised", exc_info=error)
    return as_engine_error(error)
