"""Every model that lmdeploy serves, on a GPU: with TurboMind where it can, or its PyTorch engine.

lmdeploy works on an event loop in a thread of its own, and a request is one task there: decode the
images, let lmdeploy prepare the prompt, read what it generates. What comes out is handed to our
loop many pieces at a time; an answer wanted whole crosses once. lmdeploy itself is imported by
``setup``, so this module can be imported, and its options checked, where it is not installed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from PIL import Image as Pillow
from PIL import ImageFile

from shared.checkpoints import require_whole
from shared.errors import (
    ConfigurationError,
    ContextLengthExceeded,
    EngineError,
    EngineSetupFailed,
    EngineUnavailable,
    ImageError,
    InvalidRequest,
    InvalidValue,
    RemoteCodeRefused,
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
    Image,
    Prompt,
    Sampling,
    Turn,
)
from workers.inference.engines.stopping import StopStrings
from workers.inference.internvl.preprocess import decode, open_image

log = get_logger(__name__)

NEARLY_GREEDY = 1e-3
"""Below this temperature the likeliest token is taken; dividing by it would overflow."""

MAX_TOP_K = 1024
"""TurboMind's kernels sort no more candidates."""

LOW_DETAIL_PX = 448
"""The longer side of an image of low detail, for models without tiles."""

PREPARING_THREADS = 8

PROBE_INTERVAL_S = 5.0
PROBE_LIMIT_S = 60.0
STALL_LIMIT_S = 120.0
DRAIN_LIMIT_S = 8.0

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]

Message = dict[str, Any]
"""A message as lmdeploy takes it; ``content`` is a text or a list of parts."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's own options. ``None`` leaves the choice to lmdeploy, or as said here.

    ``backend`` ``auto`` is TurboMind for the models it supports, else the PyTorch engine; ``tp``
    how many GPUs share the model; ``cache_max_entry_count`` the share of the memory left free
    beside the weights that holds keys and values; ``max_batch_size`` how many requests are decoded
    together (None: as many as run); ``max_prefill_token_num`` prompt tokens per step;
    ``quant_policy`` how keys and values are stored: 0 as computed, 4 or 8 bits, with the PyTorch
    engine also 16 (fp8) and 17 (fp8 e5m2); ``chat_template`` one of lmdeploy's names or a JSON
    file (None: as lmdeploy detects it); ``preprocess_threads`` how many threads prepare images
    (None: 8, or 1 for models whose preparation is not known to bear more); ``log_level``
    lmdeploy's.
    """

    backend: Literal["auto", "turbomind", "pytorch"] = "auto"
    tp: _Positive = 1
    cache_max_entry_count: _Share = 0.8
    max_batch_size: _Positive | None = None
    max_prefill_token_num: _Positive | None = None
    quant_policy: Literal[0, 4, 8, 16, 17] = 0
    chat_template: str | None = None
    preprocess_threads: _Positive | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "WARNING"


def read_options(given: Mapping[str, Any]) -> Options:
    """Check the options. Raises: ConfigurationError naming the one that is wrong."""
    try:
        options = msgspec.convert(dict(given), Options)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"lmdeploy engine, options: {error}") from None
    if options.backend == "turbomind":
        check_turbomind(options)
    return options


def check_turbomind(options: Options) -> None:
    """Refuse what only the PyTorch engine can do. Raises: ConfigurationError."""
    if options.quant_policy in (16, 17):
        raise ConfigurationError(
            f"lmdeploy engine, options: TurboMind has no quant_policy {options.quant_policy}; "
            "use 0, 4 or 8, or the backend pytorch"
        )


def backend_settings(options: Options, spec: EngineSpec) -> dict[str, Any]:
    """What lmdeploy's engine configuration is made with, the same for both backends."""
    settings: dict[str, Any] = {
        "tp": options.tp,
        "session_len": spec.session_len,
        "max_batch_size": options.max_batch_size or spec.max_running,
        "cache_max_entry_count": options.cache_max_entry_count,
        "quant_policy": options.quant_policy,
        # Nobody reads lmdeploy's own counters here, and they cost time per token.
        "enable_metrics": False,
    }
    if options.max_prefill_token_num is not None:
        settings["max_prefill_token_num"] = options.max_prefill_token_num
    return settings


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """What lmdeploy's GenerationConfig is made with.

    ``do_sample`` stays on also for the likeliest token: without it lmdeploy drops the repetition
    penalty. Stop strings are not among it: its stop words are whole tokens.
    """
    greedy = sampling.temperature < NEARLY_GREEDY
    return {
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": min(sampling.min_new_tokens, sampling.max_tokens),
        "do_sample": True,
        "temperature": 1.0 if greedy else sampling.temperature,
        "top_k": 1 if greedy else min(sampling.top_k, MAX_TOP_K),
        "top_p": 1.0 if greedy else sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        # lmdeploy wants 64 bits without a sign.
        "random_seed": None if sampling.seed is None else sampling.seed % 2**64,
    }


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


def check_remote_code(folder: Path, *, trusted: bool, known: Callable[[str], bool]) -> None:
    """Refuse a folder that needs its own code without consent.

    ``known`` says of a ``model_type`` whether transformers has it built in; then the code that
    lies in the folder is not needed, and it is not run. Raises: RemoteCodeRefused.
    """
    if trusted:
        return
    for name in ("config.json", "tokenizer_config.json"):
        described = read_description(folder / name)
        if described.get("auto_map") and not known(_model_type(folder)):
            raise RemoteCodeRefused(
                f"{folder} needs code of its own (auto_map in {name}); read it, and if you trust "
                "it link the model with --trust-remote-code"
            )


def _model_type(folder: Path) -> str:
    return str(read_description(folder / "config.json").get("model_type", ""))


def read_description(path: Path) -> Mapping[str, Any]:
    """A JSON object of a model folder, empty if there is no such file. Raises: EngineSetupFailed."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EngineSetupFailed(f"{path} cannot be read: {error}") from None
    if not isinstance(described, dict):
        raise EngineSetupFailed(f"{path} must hold an object")
    return described


def messages_of(prompt: Prompt, *, tiled: bool) -> list[Message]:
    """A prompt as lmdeploy takes it, its images decoded to their last pixel.

    ``tiled`` says that the model cuts images into tiles and lets a request limit their number;
    otherwise an image of low detail is made smaller here. Raises: ImageError, InvalidValue.
    """
    return [_message(turn, prompt.images, tiled=tiled) for turn in prompt.turns]


def _message(turn: Turn, images: Sequence[Image], *, tiled: bool) -> Message:
    texts: list[str] = []
    content: list[dict[str, Any]] = []
    for number, part in enumerate(turn.parts):
        if isinstance(part, int):
            content.append(_image_part(part, images, tiled=tiled))
            continue
        last = number == len(turn.parts) - 1
        # lmdeploy joins parts without anything between them.
        text = part if last or part.endswith((" ", "\n")) else f"{part}\n"
        texts.append(text)
        content.append({"type": "text", "text": text})
    if len(texts) == len(content):
        return {"role": turn.role, "content": "".join(texts)}
    return {"role": turn.role, "content": content}


def _image_part(index: int, images: Sequence[Image], *, tiled: bool) -> dict[str, Any]:
    if not 0 <= index < len(images):
        raise InvalidValue(f"a message refers to image {index}, which the request does not hold")
    image = images[index]
    picture = decode(open_image(image))
    data: dict[str, Any] = {"data": picture}
    if image.detail == "low" and tiled:
        data["max_dynamic_patch"] = 1
    elif image.detail == "low":
        picture.thumbnail((LOW_DETAIL_PX, LOW_DETAIL_PX), Pillow.Resampling.BICUBIC)
    return {"type": "image_data", "image_data": data}


@dataclass(frozen=True)
class _Loaded:
    """A running lmdeploy pipeline and what of lmdeploy is needed to ask it."""

    pipe: Any
    make_config: Callable[..., Any]
    request_error: type[Exception]
    tiled: bool
    threads: ThreadPoolExecutor

    @property
    def engine(self) -> Any:
        """lmdeploy's AsyncEngine."""
        return self.pipe.async_engine

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop the engine is bound to, in lmdeploy's thread."""
        loop: asyncio.AbstractEventLoop = self.pipe.internal_thread.loop
        return loop

    def close(self) -> None:
        """Stop lmdeploy and give the GPU's memory back; nothing may be running."""
        import torch

        self.pipe.close()
        self.pipe.session_mgr.request_handle_pool.clear()
        self.threads.shutdown(wait=True, cancel_futures=True)
        gc.collect()
        torch.cuda.empty_cache()


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
        self._loaded: _Loaded | None = None
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
        self._loaded = await asyncio.to_thread(_load, self._spec, self._options)
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

    async def abort(self, prompt_id: int) -> None:
        """Stop working on a prompt."""
        for flight in [flight for flight in self._flights if flight.prompt.id == prompt_id]:
            self._give_up(flight, RequestAborted())

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

    async def _watch(self, loaded: _Loaded) -> None:
        """Ask lmdeploy how it is, again and again."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            self._health = await _probe(loaded)
            if not self._health.ok:
                log.error("lmdeploy is not well", detail=self._health.detail)

    # --- on lmdeploy's loop -------------------------------------------------------------------

    def _launch(self, flights: Sequence[_Flight], loaded: _Loaded) -> None:
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

    async def _serve(self, flight: _Flight, loaded: _Loaded) -> None:
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

    async def _answer(self, flight: _Flight, loaded: _Loaded) -> None:
        prompt = flight.prompt
        stops = StopStrings(prompt.sampling.stop)
        messages = await loaded.loop.run_in_executor(
            loaded.threads, lambda: messages_of(prompt, tiled=loaded.tiled)
        )
        flight.session = loaded.pipe.session_mgr.get()
        request = await loaded.engine.preprocess(
            messages,
            session_id=flight.session,
            gen_config=loaded.make_config(**generation_settings(prompt.sampling)),
        )
        room = loaded.engine.session_len - request.input_token_len
        request.gen_config.max_new_tokens = min(request.gen_config.max_new_tokens, room)
        request.gen_config.min_new_tokens = min(request.gen_config.min_new_tokens, room)
        # A stop string can only be noticed in what comes in pieces.
        stepwise = flight.streamed or bool(prompt.sampling.stop)
        async with aclosing(loaded.engine.generate(request, stream_response=stepwise)) as outputs:
            await self._relay(flight, outputs, stops, loaded)

    async def _relay(
        self, flight: _Flight, outputs: AsyncIterator[Any], stops: StopStrings, loaded: _Loaded
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


def _decoded(loaded: _Loaded, ids: Sequence[int]) -> str:
    """The text of a whole answer.

    lmdeploy holds a piece of text back while it ends within a character; a whole answer is one
    piece, so one cut there by its token limit would be lost.
    """
    text: str = loaded.engine.tokenizer.decode(ids, skip_special_tokens=True)
    return text.rstrip("\ufffd")


async def _probe(loaded: _Loaded) -> Health:
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


# --- loading, in a thread ------------------------------------------------------------------------


def _load(spec: EngineSpec, options: Options) -> _Loaded:
    """Load the model with lmdeploy. Raises: EngineSetupFailed, RemoteCodeRefused."""
    if spec.path is None or not Path(spec.path).is_dir():
        raise EngineSetupFailed(f"there is no model folder {spec.path}; link the model by its path")
    _import_lmdeploy()
    require_whole(Path(spec.path), pickles=spec.trust_remote_code)
    _check_gpus(options)
    check_remote_code(Path(spec.path), trusted=spec.trust_remote_code, known=_in_transformers)
    _describe_internvl(Path(spec.path))
    complaints = _Complaints()
    logger = logging.getLogger("lmdeploy")
    logger.addHandler(complaints)
    try:
        return _start_pipeline(spec, options, spec.path)
    except VlmqError:
        raise
    except SystemExit:
        # lmdeploy leaves the process when a check fails, and says why only in its log.
        said = "; ".join(complaints.said) or "its messages above say why"
        raise EngineSetupFailed(f"lmdeploy refused {spec.path}: {said}") from None
    except Exception as error:
        raise _setup_failure(spec.path, error) from error
    finally:
        logger.removeHandler(complaints)


class _Complaints(logging.Handler):
    """Remembers the errors that lmdeploy logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message, in one line."""
        self.said.append(" ".join(record.getMessage().split()))


def _setup_failure(path: str, error: Exception) -> VlmqError:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if "trust_remote_code" in text:
        return RemoteCodeRefused(
            f"{path} needs code of its own; read it, and if you trust it link the model with "
            f"--trust-remote-code ({text})"
        )
    if "out of memory" in text.lower():
        return EngineSetupFailed(
            f"{path} does not fit into the GPU's memory; free some, or lower max_running, "
            f"session_len or cache_max_entry_count, or raise tp ({text})"
        )
    return EngineSetupFailed(f"lmdeploy could not load {path}: {text}")


def _import_lmdeploy() -> None:
    try:
        import lmdeploy
        import lmdeploy.vl.media.image  # noqa: F401 - the module that touches Pillow
    except (ImportError, OSError) as error:
        raise EngineSetupFailed(
            f"lmdeploy cannot be imported ({error}); install vlmq[inference] on this machine"
        ) from error
    # lmdeploy makes Pillow accept half images; a caption of half an image would be a silent error.
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def _check_gpus(options: Options) -> None:
    import torch

    if not torch.cuda.is_available():
        raise EngineSetupFailed("lmdeploy needs an NVIDIA GPU, and torch sees none")
    if options.tp > torch.cuda.device_count():
        raise EngineSetupFailed(
            f"tp is {options.tp}, but this process sees {torch.cuda.device_count()} GPUs"
        )


def _in_transformers(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _describe_internvl(folder: Path) -> None:
    """Let transformers read the config of an InternVL2 that comes without code of its own.

    lmdeploy has the network, but takes the config's classes from the checkpoint's code.
    """
    config = read_description(folder / "config.json")
    if config.get("model_type") != "internvl_chat" or config.get("auto_map"):
        return
    from lmdeploy.pytorch import envs
    from transformers import AutoConfig

    from workers.inference.internvl.configuration_internvl_chat import InternVLChatConfig

    AutoConfig.register("internvl_chat", InternVLChatConfig, exist_ok=True)
    # The PyTorch engine's checks run in a new process, which does not know these classes.
    envs.enable_check_env = False


def _start_pipeline(spec: EngineSpec, options: Options, path: str) -> _Loaded:
    from lmdeploy import GenerationConfig, pipeline
    from lmdeploy.serve.core.exceptions import RequestError

    pipe = pipeline(
        path,
        backend_config=_backend_config(spec, options, path),
        chat_template_config=_chat_template(options, path),
        log_level=options.log_level,
        trust_remote_code=spec.trust_remote_code,
    )
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    encoder = getattr(pipe.async_engine, "vl_encoder", None)
    threads = _widen(encoder, pipe.async_engine.backend, options)
    return _Loaded(
        pipe=pipe,
        make_config=GenerationConfig,
        request_error=RequestError,
        # The only ones of lmdeploy's models that take a limit of tiles with an image.
        tiled=pipe.async_engine.arch == "InternVLChatModel",
        threads=threads,
    )


def _backend_config(spec: EngineSpec, options: Options, path: str) -> Any:
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig, turbomind
    from lmdeploy.turbomind.supported_models import is_supported

    supported = is_supported(path, trust_remote_code=spec.trust_remote_code)
    if options.backend == "turbomind" and not supported:
        raise EngineSetupFailed(
            f"TurboMind does not support the model in {path}; use the backend auto or pytorch"
        )
    settings = backend_settings(options, spec)
    if options.backend == "pytorch" or not supported:
        return PytorchEngineConfig(**settings)
    check_turbomind(options)
    if not turbomind.is_available():
        # lmdeploy would go on with its slower engine, and nobody would know why.
        raise EngineSetupFailed(
            "TurboMind's native module cannot be loaded "
            f"({turbomind._import_error}); install the CUDA libraries "  # noqa: SLF001
            "it names, or set the option backend to pytorch"
        )
    return TurbomindEngineConfig(**settings)


def _chat_template(options: Options, path: str) -> Any:
    from lmdeploy import ChatTemplateConfig
    from lmdeploy.model import MODELS

    chosen = options.chat_template
    if chosen is None:
        return None
    if chosen in MODELS.module_dict:
        return ChatTemplateConfig(model_name=chosen, model_path=path)
    if Path(chosen).is_file():
        return ChatTemplateConfig.from_json(chosen)
    names = ", ".join(sorted(MODELS.module_dict))
    raise EngineSetupFailed(
        f"there is no chat template '{chosen}': it is no file, and lmdeploy knows {names}"
    )


def _widen(encoder: Any, backend: str, options: Options) -> ThreadPoolExecutor:
    """The threads that decode images, and prepare them too where lmdeploy's one is not enough.

    lmdeploy prepares images in a single thread. Where that runs a tokenizer, or the vision model
    itself, more than one at a time is not known to be safe.
    """
    wide = encoder is not None and (
        not encoder._uses_new_preprocess  # noqa: SLF001
        and (backend == "pytorch" or encoder.model._turbomind_native_vision)  # noqa: SLF001
    )
    count = options.preprocess_threads or PREPARING_THREADS
    threads = ThreadPoolExecutor(count, thread_name_prefix="prepare")
    if encoder is not None and (wide or options.preprocess_threads is not None):
        encoder.executor.shutdown(wait=False)
        encoder.executor = threads
    return threads
