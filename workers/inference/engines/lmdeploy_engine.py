"""Every model that lmdeploy serves, on a GPU: with TurboMind where it can, or its PyTorch engine.

lmdeploy works on an event loop in a thread of its own, and a request is one task there: decode the
images, let lmdeploy prepare the prompt, read what it generates. What comes out is handed to our
loop many pieces at a time; an answer wanted whole crosses once. lmdeploy itself is imported by
``setup``, so this module can be imported, and its options checked, where it is not installed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.errors import (
    ContextLengthExceeded,
    EngineError,
    EngineUnavailable,
    ImageError,
    InvalidRequest,
    RequestAborted,
    VlmqError,
)
from shared.log import get_logger
from workers.inference.engines.base import (
    Answer,
    Completion,
    Delta,
    EngineSpec,
    FinishReason,
    Health,
    Prompt,
    Tiling,
)
from workers.inference.engines.lmdeploy_loading import Loaded, load
from workers.inference.engines.lmdeploy_options import generation_settings, read_options
from workers.inference.engines.lmdeploy_prompts import messages_of
from workers.inference.engines.stopping import StopStrings

log = get_logger(__name__)

PROBE_INTERVAL_S = 5.0
PROBE_LIMIT_S = 60.0
STALL_LIMIT_S = 120.0
DRAIN_LIMIT_S = 8.0


def error_for(code: str, message: str, *, images: bool) -> VlmqError:
    """Our word for an lmdeploy error code; ``images`` says whether the prompt had any."""
    match code:
        case "context_length_exceeded":
            return ContextLengthExceeded(f"{message} Images included.")
        case "invalid_request" | "unsupported_feature":
            return InvalidRequest(message)
        case "preprocess_failed" if images:
            return ImageError(f"lmdeploy could not prepare the prompt and its images: {message}")
        case "request_cancelled":
            return RequestAborted()
        case "engine_unavailable":
            return EngineUnavailable(message)
    return EngineError(f"lmdeploy failed on this request ({code}): {message}")


@dataclass(eq=False)
class _Flight:
    """A request between its arrival and its answer.

    ``ended`` belongs to our loop, ``task`` and ``session`` to lmdeploy's.
    """

    prompt: Prompt
    streamed: bool
    pieces: asyncio.Queue[tuple[int, Delta | Completion | VlmqError]]
    ended: bool = False
    task: asyncio.Task[None] | None = None
    session: Any = None

    def deliver(self, piece: Delta | Completion | VlmqError) -> None:
        """Hand a piece to who waits for it; after the last one nothing comes."""
        if self.ended:
            return
        self.ended = not isinstance(piece, Delta) or piece.finish_reason is not None
        self.pieces.put_nowait((self.prompt.id, piece))


class _Outbox:
    """Carries pieces from lmdeploy's thread to our loop, waking it once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: deque[tuple[_Flight, Delta | Completion | VlmqError]] = deque()
        self._due = False

    def put(self, flight: _Flight, piece: Delta | Completion | VlmqError) -> None:
        """Send a piece; called in lmdeploy's thread."""
        self._pieces.append((flight, piece))
        if not self._due:
            self._due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the first look: what is put after the last one then wakes us again.
        self._due = False
        while self._pieces:
            flight, piece = self._pieces.popleft()
            flight.deliver(piece)


class LmdeployEngine:
    """An :class:`~workers.inference.engines.base.Engine` over lmdeploy's ``pipeline``.

    Raises: ConfigurationError for options it does not know.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._options = read_options(spec.options)
        self._loaded: Loaded | None = None
        self._flights: set[_Flight] = set()
        # These two belong to lmdeploy's loop.
        self._working: set[_Flight] = set()
        self._aborting: set[asyncio.Task[None]] = set()
        self._outbox: _Outbox | None = None
        self._monitor: asyncio.Task[None] | None = None
        self._health = Health(False, "not set up")

    # --- the contract -------------------------------------------------------------------------

    async def setup(self) -> None:
        """Load the model. Raises: EngineSetupFailed, RemoteCodeRefused, ConfigurationError."""
        self._loaded = await asyncio.to_thread(load, self._spec, self._options)
        self._outbox = _Outbox(asyncio.get_running_loop())
        self._health = Health(True, f"lmdeploy, {self._loaded.engine.backend}")
        self._monitor = asyncio.create_task(self._watch(self._loaded))

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """Answer one prompt.

        Raises: ContextLengthExceeded, ImageError, InvalidRequest, RequestAborted, EngineError.
        """
        pieces: asyncio.Queue[tuple[int, Delta | Completion | VlmqError]] = asyncio.Queue()
        flights = self._start([prompt], pieces, streamed=True)
        try:
            while True:
                _, piece = await pieces.get()
                if isinstance(piece, VlmqError):
                    raise piece
                assert isinstance(piece, Delta)
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._forget(flights)

    async def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Answer many prompts, each whole, in the order they finish."""
        pieces: asyncio.Queue[tuple[int, Delta | Completion | VlmqError]] = asyncio.Queue()
        flights = self._start(prompts, pieces, streamed=False)
        try:
            for _ in flights:
                prompt_id, piece = await pieces.get()
                assert not isinstance(piece, Delta)
                yield prompt_id, piece
        finally:
            self._forget(flights)

    def tiling(self) -> Tiling | None:
        """The model's own for InternVL; other models' images are lmdeploy's business."""
        ready = self._loaded.ready if self._loaded is not None else None
        return None if ready is None else ready.tiling

    async def abort(self, prompt_id: int) -> None:
        """Stop working on a prompt."""
        for flight in [flight for flight in self._flights if flight.prompt.id == prompt_id]:
            self._give_up(flight, RequestAborted())

    def hurry(self, hurried: bool) -> None:  # noqa: FBT001 - a state, not an option
        """Let the PyTorch engine begin at once; TurboMind always does."""
        if self._loaded is not None and self._loaded.steps is not None:
            self._loaded.steps.hurry(hurried)

    def health(self) -> Health:
        """What lmdeploy's own probe said last: alive, and its scheduler goes on."""
        return self._health

    async def close(self) -> None:
        """Let go of the model; requests still inside fail with EngineUnavailable."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._health = Health(False, "closed")
        if self._monitor is not None:
            self._monitor.cancel()
        for flight in list(self._flights):
            flight.deliver(EngineUnavailable("the engine has stopped"))
        # lmdeploy's own close leaves callers hanging, so nothing may be inside by then.
        drained = asyncio.run_coroutine_threadsafe(self._drain(), loaded.loop)
        try:
            async with asyncio.timeout(DRAIN_LIMIT_S):
                await asyncio.wrap_future(drained)
        except TimeoutError:
            log.warning("lmdeploy did not let go of its requests", limit_s=DRAIN_LIMIT_S)
            return
        await asyncio.to_thread(loaded.close)

    # --- on our loop --------------------------------------------------------------------------

    def _start(
        self,
        prompts: Sequence[Prompt],
        pieces: asyncio.Queue[tuple[int, Delta | Completion | VlmqError]],
        *,
        streamed: bool,
    ) -> list[_Flight]:
        if self._loaded is None:
            raise EngineUnavailable("the engine is not running")
        flights = [_Flight(prompt, streamed, pieces) for prompt in prompts]
        self._flights.update(flights)
        self._loaded.loop.call_soon_threadsafe(self._launch, flights, self._loaded)
        return flights

    def _forget(self, flights: Sequence[_Flight]) -> None:
        for flight in flights:
            if not flight.ended:
                self._give_up(flight, RequestAborted())
            self._flights.discard(flight)

    def _give_up(self, flight: _Flight, error: VlmqError) -> None:
        flight.deliver(error)
        if self._loaded is not None:
            self._loaded.loop.call_soon_threadsafe(self._let_go, flight)

    async def _watch(self, loaded: Loaded) -> None:
        """Ask lmdeploy how it is, again and again."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            self._health = await _probe(loaded)
            if not self._health.ok:
                log.error("lmdeploy is not well", detail=self._health.detail)

    # --- on lmdeploy's loop -------------------------------------------------------------------

    def _launch(self, flights: Sequence[_Flight], loaded: Loaded) -> None:
        for flight in flights:
            if not flight.ended:
                self._working.add(flight)
                flight.task = loaded.loop.create_task(self._serve(flight, loaded))
                # Not in the task itself: cancelled before its first step, it would not get there.
                flight.task.add_done_callback(partial(self._done, flight))

    def _done(self, flight: _Flight, _: asyncio.Task[None]) -> None:
        self._working.discard(flight)

    def _abort_in_engine(self, flight: _Flight) -> None:
        task = asyncio.get_running_loop().create_task(flight.session.async_abort())
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    def _let_go(self, flight: _Flight) -> None:
        """Stop a request where it is: in lmdeploy's engine, or before it."""
        if flight.task is None or flight.task.done():
            return
        # Its session has a handle exactly while the engine works on it, and only then can the
        # engine be told; cancelling the task there would only wait for the same.
        if flight.session is not None and flight.session._handle is not None:  # noqa: SLF001
            self._abort_in_engine(flight)
        else:
            flight.task.cancel()

    async def _drain(self) -> None:
        """Stop every request and wait until lmdeploy has let go of them."""
        tasks = [flight.task for flight in self._working if flight.task is not None]
        for flight in list(self._working):
            self._let_go(flight)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, flight: _Flight, loaded: Loaded) -> None:
        assert self._outbox is not None
        try:
            await self._answer(flight, loaded)
        except asyncio.CancelledError:
            self._outbox.put(flight, RequestAborted())
            raise
        except VlmqError as error:
            self._outbox.put(flight, error)
        except loaded.request_error as error:
            code = getattr(error, "code", "")
            self._outbox.put(
                flight,
                error_for(
                    str(getattr(code, "value", code)),
                    str(error),
                    images=bool(flight.prompt.images),
                ),
            )
        # Whatever a model's own code raises is this request's failure alone.
        except Exception as error:
            log.exception("lmdeploy raised")
            failure = EngineError(f"lmdeploy failed: {type(error).__name__}: {error}")
            self._outbox.put(flight, failure)
        finally:
            loaded.pipe.session_mgr.remove(flight.session)

    async def _answer(self, flight: _Flight, loaded: Loaded) -> None:
        prompt = flight.prompt
        stops = StopStrings(prompt.sampling.stop)
        flight.session = loaded.pipe.session_mgr.get()
        request = await self._request(flight, loaded)
        room = loaded.engine.session_len - request.input_token_len
        request.gen_config.max_new_tokens = min(request.gen_config.max_new_tokens, room)
        request.gen_config.min_new_tokens = min(request.gen_config.min_new_tokens, room)
        # A stop string can only be noticed in what comes in pieces.
        stepwise = flight.streamed or bool(prompt.sampling.stop)
        async with aclosing(loaded.engine.generate(request, stream_response=stepwise)) as outputs:
            await self._relay(flight, outputs, stops, loaded)

    async def _request(self, flight: _Flight, loaded: Loaded) -> Any:
        """The prompt as lmdeploy's request. Raises: ImageError, InvalidValue, RequestError."""
        prompt, ready = flight.prompt, loaded.ready
        if ready is not None:
            ready.require_plain(prompt)
        config = loaded.make_config(**generation_settings(prompt.sampling))
        threads = loaded.chat_threads if flight.streamed else loaded.threads
        in_thread = partial(loaded.loop.run_in_executor, threads)
        if ready is None or not ready.fits(prompt):
            messages = await in_thread(partial(messages_of, prompt, tiled=loaded.tiled))
            return await loaded.engine.preprocess(
                messages, session_id=flight.session, gen_config=config
            )
        inputs = ready.inputs(prompt, await in_thread(ready.pixels, prompt))
        request = await loaded.engine.preprocess(
            None, session_id=flight.session, gen_config=config, input_ids=inputs["input_ids"]
        )
        # preprocess knows ids alone; an engine looks for the images beside them.
        request.inputs = inputs
        return request

    async def _relay(
        self, flight: _Flight, outputs: AsyncIterator[Any], stops: StopStrings, loaded: Loaded
    ) -> None:
        """Pass on what lmdeploy generates, up to a stop string or its end."""
        texts: list[str] = []
        ids: list[int] = []
        ended = False
        async for output in outputs:
            if ended:
                continue
            text, stopped = stops.push(output.response)
            ids += output.token_ids or []
            reason = _finish_reason(output.finish_reason, stopped=stopped)
            if reason is None:
                self._pass_on(flight, text, texts)
                continue
            if not stopped:
                text += stops.flush()
            counts = (output.input_token_len, output.generate_token_len)
            if not (text or texts or flight.streamed or stopped):
                text = _decoded(loaded, ids)
            self._end(flight, text, texts, reason, counts)
            ended = True
            if stopped:
                await flight.session.async_abort()
        if not ended:
            raise EngineError("lmdeploy ended this request without a finish reason")

    def _pass_on(self, flight: _Flight, text: str, texts: list[str]) -> None:
        assert self._outbox is not None
        if not text:
            return
        if flight.streamed:
            self._outbox.put(flight, Delta(text))
        else:
            texts.append(text)

    def _end(
        self,
        flight: _Flight,
        text: str,
        texts: list[str],
        reason: FinishReason,
        counts: tuple[int, int],
    ) -> None:
        assert self._outbox is not None
        if flight.streamed:
            self._outbox.put(flight, Delta(text, reason, *counts))
        else:
            self._outbox.put(flight, Completion("".join([*texts, text]), reason, *counts))


def _finish_reason(given: str | None, *, stopped: bool) -> FinishReason | None:
    """Why the answer ends here, or None if it goes on. Raises: RequestAborted, EngineError."""
    if stopped:
        return "stop"
    match given:
        case None:
            return None
        case "stop":
            return "stop"
        case "length":
            return "length"
        case "abort":
            raise RequestAborted()
    raise EngineError(f"lmdeploy ended this request with '{given}'")


def _decoded(loaded: Loaded, ids: Sequence[int]) -> str:
    """The text of a whole answer.

    lmdeploy holds a piece of text back while it ends within a character; a whole answer is one
    piece, so one cut there by its token limit would be lost.
    """
    text: str = loaded.engine.tokenizer.decode(ids, skip_special_tokens=True)
    return text.rstrip("\ufffd")


async def _probe(loaded: Loaded) -> Health:
    asked = asyncio.run_coroutine_threadsafe(loaded.engine.health_probe(STALL_LIMIT_S), loaded.loop)
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            answer = await asyncio.wrap_future(asked)
    except TimeoutError:
        return Health(False, f"lmdeploy's thread did not answer for {PROBE_LIMIT_S:.0f} s")
    # A probe that fails is itself the finding.
    except Exception as error:  # noqa: BLE001
        return Health(False, f"lmdeploy's health probe failed: {error}")
    return Health(answer["status"] == "healthy", str(answer["message"]))
