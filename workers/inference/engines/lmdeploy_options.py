"""What can be set for the lmdeploy engine, and what lmdeploy is told because of it.

Pure: lmdeploy itself is not imported here, so options can be checked where it is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from shared.errors import ConfigurationError, EngineSetupFailed
from workers.inference.engines.base import EngineSpec, Sampling

NEARLY_GREEDY = 1e-3
"""Below this temperature the likeliest token is taken; dividing by it would overflow."""

MAX_TOP_K = 1024
"""TurboMind's kernels sort no more candidates."""

DEFAULT_CACHE_SHARE = 0.8
MAX_CACHE_SHARE = 0.92
MIN_CACHE_BYTES = 256 * 2**20
MIN_RESERVE_BYTES = 2 * 2**30
"""At least this much of a replica's memory is for activations and what CUDA itself takes."""
RESERVE_SHARE = 0.1

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's own options. ``None`` leaves the choice to lmdeploy, or as said here.

    ``backend`` ``auto`` is TurboMind for the models it supports, else the PyTorch engine; ``tp``
    how many GPUs share the model; ``cache_max_entry_count`` the share of the memory left free
    beside the weights that holds keys and values (None: what the replica's ``memory_share``
    leaves, else 0.8); ``max_batch_size`` how many requests are decoded together (None: as many as
    run); ``max_prefill_token_num`` prompt tokens per step; ``quant_policy`` how keys and values
    are stored: 0 as computed, 4 or 8 bits, with the PyTorch engine also 16 (fp8) and 17 (fp8
    e5m2); ``prefix_caching`` keeps keys and values of prompts for others that begin alike;
    ``chat_template`` one of lmdeploy's names or a JSON file (None: as lmdeploy detects it);
    ``preprocess_threads`` how many threads prepare images (None: 8, or 1 for models whose
    preparation is not known to bear more); ``log_level`` lmdeploy's; ``extra`` more fields of
    lmdeploy's engine configuration, by their names.
    """

    backend: Literal["auto", "turbomind", "pytorch"] = "auto"
    tp: _Positive = 1
    cache_max_entry_count: _Share | None = None
    max_batch_size: _Positive | None = None
    max_prefill_token_num: _Positive | None = None
    quant_policy: Literal[0, 4, 8, 16, 17] = 0
    prefix_caching: bool = False
    chat_template: str | None = None
    preprocess_threads: _Positive | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "WARNING"
    extra: dict[str, Any] = {}


class GpuMemory(msgspec.Struct, frozen=True):
    """One GPU's memory before a model is loaded into it, and the model's weights, in bytes."""

    total: int
    free: int
    weights: int


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


def backend_settings(
    options: Options, spec: EngineSpec, memory: GpuMemory | None = None
) -> dict[str, Any]:
    """What lmdeploy's engine configuration is made with, the same for both backends.

    Raises: ConfigurationError if ``extra`` says again what has an option of its own;
    EngineSetupFailed if the replica's share of the memory does not hold the model.
    """
    settings: dict[str, Any] = {
        "tp": options.tp,
        "session_len": spec.session_len,
        "max_batch_size": options.max_batch_size or spec.max_running,
        "cache_max_entry_count": cache_share(options, spec, memory),
        "quant_policy": options.quant_policy,
        "enable_prefix_caching": options.prefix_caching,
        # Nobody reads lmdeploy's own counters here, and they cost time per token.
        "enable_metrics": False,
    }
    if options.max_prefill_token_num is not None:
        settings["max_prefill_token_num"] = options.max_prefill_token_num
    for name in options.extra:
        if name in settings or name == "max_prefill_token_num":
            raise ConfigurationError(
                f"lmdeploy engine, options: extra.{name} has an option or a setting of its own"
            )
    return {**settings, **options.extra}


def cache_share(options: Options, spec: EngineSpec, memory: GpuMemory | None) -> float:
    """The part of the memory left free beside the weights that may hold keys and values.

    lmdeploy measures what is free itself; so that several replicas can share a GPU, each is told
    the part of it that makes its whole use its ``memory_share``. Raises: EngineSetupFailed.
    """
    if memory is not None:
        _require_room(memory)
    if options.cache_max_entry_count is not None:
        return options.cache_max_entry_count
    if spec.memory_share is None or memory is None:
        return DEFAULT_CACHE_SHARE
    budget = spec.memory_share * memory.total
    cache = budget - memory.weights - max(MIN_RESERVE_BYTES, RESERVE_SHARE * budget)
    left = memory.free - memory.weights
    if cache < MIN_CACHE_BYTES:
        raise EngineSetupFailed(
            f"the model's weights take {_gib(memory.weights)} of the {_gib(budget)} that this "
            f"replica may use ({_gib(memory.free)} of the GPU's {_gib(memory.total)} are free), "
            "which leaves too little for keys and values; raise memory_share, run fewer replicas "
            "on this GPU, or raise tp"
        )
    return round(min(MAX_CACHE_SHARE, cache / left), 4)


def _require_room(memory: GpuMemory) -> None:
    """Refuse what cannot be loaded: TurboMind would not say so, its process would abort."""
    if memory.free - memory.weights < MIN_CACHE_BYTES:
        raise EngineSetupFailed(
            f"the model's weights take {_gib(memory.weights)}, and {_gib(memory.free)} of the "
            f"GPU's {_gib(memory.total)} are free; end what else runs on the GPU, or raise tp"
        )


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


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
