"""Loading a model with lmdeploy: what is checked first, and every way in which it fails.

lmdeploy leaves the process with SystemExit when it does not like what it finds, imports half of
itself where a library is missing, and makes Pillow accept half images. All of that ends here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageFile

from shared.checkpoints import require_whole, weights_bytes
from shared.errors import (
    ConfigurationError,
    EngineSetupFailed,
    RemoteCodeRefused,
    VlmqError,
)
from workers.inference.engines.base import EngineSpec, Tiling
from workers.inference.engines.lmdeploy_options import (
    GpuMemory,
    Options,
    backend_settings,
    check_turbomind,
)
from workers.inference.engines.lmdeploy_prompts import ReadyPrompts
from workers.inference.engines.lmdeploy_steps import PrefillSteps

CHAT_THREADS = 2
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep Python to itself while others wait: a chat passes through several
threads, and each change of hands beside a busy one takes so long (5 ms by default)."""
PREPARING_THREADS = 8


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


@dataclass(frozen=True)
class Loaded:
    """A running lmdeploy pipeline and what of lmdeploy is needed to ask it."""

    pipe: Any
    make_config: Callable[..., Any]
    request_error: type[Exception]
    tiled: bool
    ready: ReadyPrompts | None
    """For images that were cut beforehand; None where lmdeploy prepares them its own way."""
    threads: ThreadPoolExecutor
    """They prepare images of batches; those of chats have some of their own."""
    chat_threads: ThreadPoolExecutor
    steps: PrefillSteps | None
    """Of the PyTorch engine."""

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
        self.chat_threads.shutdown(wait=True, cancel_futures=True)
        gc.collect()
        torch.cuda.empty_cache()


def load(spec: EngineSpec, options: Options) -> Loaded:
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


def runs_language_model(folder: Path, known: Collection[str]) -> bool:
    """Whether the language model inside an InternVL is among the ``known`` architectures.

    lmdeploy asks for the outer one only, and then fails to load an InternVL2-4B, whose inner one,
    Phi-3, its PyTorch engine has and TurboMind has not. True for models that are no InternVL.
    """
    part = read_description(folder / "config.json").get("llm_config")
    names = part.get("architectures") if isinstance(part, Mapping) else None
    return not names or names[0] in known


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


def _start_pipeline(spec: EngineSpec, options: Options, path: str) -> Loaded:
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
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    encoder = getattr(pipe.async_engine, "vl_encoder", None)
    threads = _widen(encoder, pipe.async_engine.backend, options)
    # The only ones of lmdeploy's models that take a limit of tiles with an image.
    tiled = pipe.async_engine.arch == "InternVLChatModel"
    return Loaded(
        pipe=pipe,
        make_config=GenerationConfig,
        request_error=RequestError,
        tiled=tiled,
        ready=_ready_prompts(pipe.async_engine) if tiled else None,
        threads=threads,
        chat_threads=_preparers(CHAT_THREADS),
        steps=PrefillSteps(pipe.async_engine.engine)
        if pipe.async_engine.backend == "pytorch"
        else None,
    )


def _backend_config(spec: EngineSpec, options: Options, path: str) -> Any:
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig, turbomind
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS, is_supported

    supported = is_supported(path, trust_remote_code=spec.trust_remote_code) and (
        runs_language_model(Path(path), SUPPORTED_ARCHS)
    )
    if options.backend == "turbomind" and not supported:
        raise EngineSetupFailed(
            f"TurboMind does not support the model in {path}; use the backend auto or pytorch"
        )
    settings = backend_settings(options, spec, _gpu_memory(Path(path), options))
    if options.backend == "pytorch" or not supported:
        return _configured(PytorchEngineConfig, settings)
    check_turbomind(options)
    if not turbomind.is_available():
        # lmdeploy would go on with its slower engine, and nobody would know why.
        raise EngineSetupFailed(
            "TurboMind's native module cannot be loaded "
            f"({turbomind._import_error}); install the CUDA libraries "  # noqa: SLF001
            "it names, or set the option backend to pytorch"
        )
    return _configured(TurbomindEngineConfig, settings)


def _configured(kind: Any, settings: Mapping[str, Any]) -> Any:
    """An engine configuration of lmdeploy's. Raises: ConfigurationError naming a wrong field."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            raise ConfigurationError(
                f"lmdeploy engine, options: {kind.__name__} has no field '{name}' (extra.{name})"
            )
    try:
        return kind(**settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(f"lmdeploy engine, options: {error}") from None


def _gpu_memory(folder: Path, options: Options) -> GpuMemory:
    import torch

    free, total = torch.cuda.mem_get_info()
    return GpuMemory(total, free, weights_bytes(folder) // options.tp)


def _ready_prompts(engine: Any) -> ReadyPrompts | None:
    """What makes requests of images cut beforehand, if this model's tiles are known.

    Older InternVL-Chat models scale an image to one square by other rules.
    """
    model = engine.vl_encoder.model
    config = engine.hf_cfg
    if model.processor.__name__ != "_preprocess_v1_5":
        return None
    tiling = Tiling(
        model.vision_config.image_size,
        config.min_dynamic_patch,
        config.max_dynamic_patch,
        thumbnail=bool(config.use_thumbnail),
    )
    return ReadyPrompts(engine, tiling)


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
    threads = _preparers(options.preprocess_threads or PREPARING_THREADS)
    if encoder is not None and (wide or options.preprocess_threads is not None):
        encoder.executor.shutdown(wait=False)
        encoder.executor = threads
    return threads


def _preparers(count: int) -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(
        count,
        thread_name_prefix="prepare",
        # Each of them with a team of its own would be more threads than processors.
        initializer=lambda: torch.set_num_threads(1),
    )
