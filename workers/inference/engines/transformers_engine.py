"""The embedded engine: InternVL2-architecture checkpoints through torch, on a CPU by default.

The event loop only hands things over. Images are decoded and prompts encoded in a few threads;
torch runs in one thread, one step of the running batch at a time, and what happens between two
steps (requests joining, aborts) is decided on the loop. So no lock is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import (
    ContextLengthExceeded,
    EngineError,
    EngineSetupFailed,
    EngineUnavailable,
    InvalidValue,
    RequestAborted,
    VlmqError,
)
from workers.inference.engines.base import (
    Answer,
    Completion,
    Delta,
    EngineSpec,
    Health,
    Prompt,
    Tiling,
)
from workers.inference.engines.stopping import StopStrings
from workers.inference.internvl import template
from workers.inference.internvl.backbone import no_tiles
from workers.inference.internvl.batch import Batch, Event, Request
from workers.inference.internvl.load import Loaded, load
from workers.inference.internvl.preprocess import Picture, tiling_of

log = logging.getLogger(__name__)

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """The engine's own options.

    ``device`` is ``cpu`` or ``cuda``; ``dtype`` ``auto``, ``float32`` or ``bfloat16``; ``threads``
    how many torch computes with (0: its own choice); ``prefill_tokens`` how many prompt tokens,
    padding included, may join in one step, so that a long prompt does not stop the others for long.
    """

    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    prefill_tokens: int = 8192

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Options:
        """Check the options. Raises: EngineSetupFailed naming the one that is wrong."""
        for name, value in given.items():
            default = getattr(cls, name, None)
            if default is None:
                known = ", ".join(sorted(cls.__dataclass_fields__))
                raise EngineSetupFailed(f"unknown option '{name}'; this engine knows {known}")
            if type(value) is not type(default):
                raise EngineSetupFailed(f"the option '{name}' cannot be {value!r}")
        options = cls(**given)
        if options.dtype not in _DTYPES:
            raise EngineSetupFailed(f"the option 'dtype' must be one of {', '.join(_DTYPES)}")
        if options.device.partition(":")[0] not in ("cpu", "cuda"):
            raise EngineSetupFailed("the option 'device' must be cpu or cuda")
        if options.threads < 0 or options.prefill_tokens < 1:
            raise EngineSetupFailed("'threads' and 'prefill_tokens' cannot be negative")
        return options


@dataclass(eq=False)
class _Flight:
    """A request between its arrival and its last delta."""

    key: int
    prompt: Prompt
    streamed: bool
    pieces: asyncio.Queue[Delta | VlmqError] = field(default_factory=asyncio.Queue)
    aborted: bool = False


@dataclass
class _Lane:
    """Requests before the batch: those that arrived, and those whose images are decoded.

    Only ``ahead`` are decoded before their time, because tiles take much memory.
    """

    ahead: int
    arrived: deque[_Flight] = field(default_factory=deque)
    ready: deque[Request] = field(default_factory=deque)
    preparing: int = 0

    def next_to_prepare(self) -> _Flight | None:
        """Take an arrival that may be prepared now."""
        while self.arrived and self.preparing + len(self.ready) < self.ahead:
            flight = self.arrived.popleft()
            if not flight.aborted:
                self.preparing += 1
                return flight
        return None

    def __len__(self) -> int:
        return len(self.arrived) + self.preparing + len(self.ready)


class TransformersEngine:
    """An :class:`~workers.inference.engines.base.Engine` for InternVL2 checkpoints.

    Up to ``spec.max_running`` requests are decoded together; as many again wait with their images
    decoded. Sessions are at most as long as the model's positions reach.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._loaded: Loaded | None = None
        self._batch: Batch | None = None
        self._session_len = spec.session_len
        self._keys = count()
        self._flights: dict[int, _Flight] = {}
        self._running: set[int] = set()
        # Streams and batches wait apart, or a chat would queue behind a whole chunk.
        self._streams = _Lane(spec.max_running)
        self._bulk = _Lane(spec.max_running)
        self._options = Options()
        self._driver: asyncio.Task[None] | None = None
        self._preparing: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="torch")
        self._preparers = ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), thread_name_prefix="prepare"
        )

    # --- the contract -------------------------------------------------------------------------

    async def setup(self) -> None:
        """Load the model. Raises: RemoteCodeRefused, EngineSetupFailed."""
        self._options = Options.parse(self._spec.options)
        if self._spec.path is None:
            raise EngineSetupFailed("this engine needs the path of a checkpoint folder")
        loop = asyncio.get_running_loop()
        self._loaded = await loop.run_in_executor(self._torch, self._load, Path(self._spec.path))
        config = self._loaded.config.language
        self._session_len = min(self._spec.session_len, config.max_position_embeddings)
        self._batch = Batch(self._loaded.backbone, self._loaded.vocabulary, self._loaded.ends)
        self._driver = asyncio.create_task(self._drive())

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """Answer one prompt.

        Raises: ContextLengthExceeded, ImageError, InvalidValue, RequestAborted, EngineError.
        """
        flight = self._start(prompt, streamed=True)
        try:
            while True:
                piece = await flight.pieces.get()
                if isinstance(piece, VlmqError):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._forget(flight)

    async def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Answer many prompts, each whole, in the order they finish."""
        tasks = [asyncio.create_task(self._answer(prompt)) for prompt in prompts]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def tiling(self) -> Tiling | None:
        """As the checkpoint's configuration says."""
        return None if self._loaded is None else tiling_of(self._loaded.config)

    async def abort(self, prompt_id: int) -> None:
        """Stop working on a prompt from the next step on; its iterator raises RequestAborted."""
        for flight in self._flights.values():
            if flight.prompt.id == prompt_id:
                flight.aborted = True
                flight.pieces.put_nowait(RequestAborted())
        self._work.set()

    def hurry(self, hurried: bool) -> None:  # noqa: FBT001 - a state, not an option
        """Every step begins with whatever has come."""

    def health(self) -> Health:
        """Say whether the model is loaded and its thread works."""
        if self._driver is None or self._batch is None:
            return Health(False, "not set up")
        if self._driver.done():
            return Health(False, "stopped")
        waiting = len(self._streams) + len(self._bulk)
        return Health(True, f"{self._batch.size} running, {waiting} waiting")

    async def close(self) -> None:
        """Let go of the model; requests still inside fail with EngineUnavailable."""
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, *self._preparing, return_exceptions=True)
        await asyncio.to_thread(self._stop_threads)
        self._batch = self._loaded = None

    # --- one request --------------------------------------------------------------------------

    def _start(self, prompt: Prompt, *, streamed: bool) -> _Flight:
        if self._driver is None or self._driver.done():
            raise EngineUnavailable("the engine is not running")
        flight = _Flight(next(self._keys), prompt, streamed)
        self._flights[flight.key] = flight
        self._lane(flight).arrived.append(flight)
        self._prepare_more()
        return flight

    def _lane(self, flight: _Flight) -> _Lane:
        return self._streams if flight.streamed else self._bulk

    async def _answer(self, prompt: Prompt) -> Answer:
        try:
            flight = self._start(prompt, streamed=False)
        except VlmqError as error:
            return prompt.id, error
        try:
            piece = await flight.pieces.get()
        finally:
            self._forget(flight)
        if isinstance(piece, VlmqError):
            return prompt.id, piece
        if piece.finish_reason is None:
            return prompt.id, EngineError("an answer that was not to be streamed came in pieces")
        return prompt.id, Completion(
            piece.text, piece.finish_reason, piece.prompt_tokens, piece.completion_tokens
        )

    def _forget(self, flight: _Flight) -> None:
        """Whatever is left of a request ends at the next step."""
        flight.aborted = True
        self._flights.pop(flight.key, None)
        self._work.set()

    def _prepare_more(self) -> None:
        """Give the threads the next arrivals."""
        for lane in (self._streams, self._bulk):
            while (flight := lane.next_to_prepare()) is not None:
                task = asyncio.create_task(self._make_ready(flight))
                self._preparing.add(task)
                task.add_done_callback(self._preparing.discard)

    async def _make_ready(self, flight: _Flight) -> None:
        assert self._loaded is not None
        lane = self._lane(flight)
        try:
            request = await asyncio.get_running_loop().run_in_executor(
                self._preparers, self._prepared, flight, self._loaded
            )
            lane.ready.append(request)
        except VlmqError as error:
            flight.pieces.put_nowait(error)
        finally:
            lane.preparing -= 1
        self._work.set()
        self._prepare_more()

    def _prepared(self, flight: _Flight, loaded: Loaded) -> Request:
        try:
            return self._prepare(flight, loaded)
        except VlmqError:
            raise
        except Exception as error:
            log.exception("a prompt could not be made ready")
            raise EngineError(f"the prompt could not be made ready: {error}") from error

    def _prepare(self, flight: _Flight, loaded: Loaded) -> Request:
        """Check and encode a prompt, and only then decode its images."""
        prompt, config = flight.prompt, loaded.config
        StopStrings(prompt.sampling.stop)  # complains of empty ones before any work is done
        order = _image_order(prompt)
        pictures = {index: Picture(prompt.images[index], config) for index in set(order)}
        counts = [
            pictures[index].tile_count * config.tokens_per_tile if index in pictures else 0
            for index in range(len(prompt.images))
        ]
        ids = template.encode(template.render(prompt.turns, counts), loaded.vocabulary)
        room = self._session_len - len(ids)
        if room < 1:
            images = sum(counts[index] for index in order)
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens, {images} of them for images; "
                f"this model's session length is {self._session_len}"
            )
        cut = {index: picture.tiles() for index, picture in pictures.items()}
        tiles = np.concatenate([no_tiles(config), *[cut[index] for index in order]])
        limit = max(1, min(prompt.sampling.max_tokens, room))
        return Request(flight.key, ids, tiles, prompt.sampling, limit, flight.streamed)

    # --- the batch ----------------------------------------------------------------------------

    async def _drive(self) -> None:
        """Step the batch while there is anything in it."""
        assert self._batch is not None
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._work.clear()
                joining = self._admit()
                if not joining and not self._running:
                    await self._work.wait()
                    continue
                events = await loop.run_in_executor(
                    self._torch, self._batch.step, joining, self._aborted()
                )
                self._deliver(events)
        except Exception:
            log.exception("the batch's thread failed; the engine stops")
            raise
        finally:
            for flight in self._flights.values():
                flight.pieces.put_nowait(EngineUnavailable("the engine has stopped"))

    def _admit(self) -> list[Request]:
        """The requests that join the next step, streams first."""
        admitted: list[Request] = []
        longest = 0
        for lane in (self._streams, self._bulk):
            while lane.ready and len(self._running) < self._spec.max_running:
                longest = max(longest, len(lane.ready[0].ids))
                if admitted and longest * (len(admitted) + 1) > self._options.prefill_tokens:
                    return admitted
                request = lane.ready.popleft()
                if request.key in self._flights and not self._flights[request.key].aborted:
                    admitted.append(request)
                    self._running.add(request.key)
        self._prepare_more()
        return admitted

    def _aborted(self) -> set[int]:
        """The keys of running requests that nobody waits for."""
        return {
            key for key in self._running if key not in self._flights or self._flights[key].aborted
        }

    def _deliver(self, events: Sequence[Event]) -> None:
        for key, event in events:
            if isinstance(event, VlmqError) or event.finish_reason is not None:
                self._running.discard(key)
            flight = self._flights.get(key)
            if flight is not None:
                flight.pieces.put_nowait(event)

    # --- threads ------------------------------------------------------------------------------

    def _load(self, folder: Path) -> Loaded:
        """Load in the thread that will compute: torch's thread count is a thread's own."""
        if self._options.device.startswith("cuda") and not torch.cuda.is_available():
            raise EngineSetupFailed("torch sees no CUDA device; set the option device to cpu")
        if self._options.threads:
            torch.set_num_threads(self._options.threads)
        return load(
            folder,
            trust_remote_code=self._spec.trust_remote_code,
            device=torch.device(self._options.device),
            dtype=_DTYPES[self._options.dtype],
        )

    def _stop_threads(self) -> None:
        self._torch.shutdown(wait=True, cancel_futures=True)
        self._preparers.shutdown(wait=True, cancel_futures=True)


def _image_order(prompt: Prompt) -> list[int]:
    """The images' indices in the order in which the turns show them. Raises: InvalidValue."""
    order = [part for turn in prompt.turns for part in turn.parts if isinstance(part, int)]
    for index in order:
        if not 0 <= index < len(prompt.images):
            raise InvalidValue(
                f"a message refers to image {index}, which the request does not hold"
            )
    return order
