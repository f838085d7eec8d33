"""Which models a node serves, and with what: configured, linked, or the bundled tiny one.

Decided once, before anything starts, so that what is missing is said at once and in full.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from shared.errors import ConfigurationError
from shared.models import ModelDefaults, ModelRecord, ModelRegistry
from shared.settings import ServeSettings, Settings
from workers.inference.engines.base import EngineSpec
from workers.placement import count_running

TINY_NAME = "tiny-internvl2"
TINY_CHECKPOINT = Path(__file__).parent / "inference" / "tiny" / "checkpoint"
DEFAULT_ENGINE = "transformers"
_TRANSFORMERS_NEEDS = ("torch", "transformers", "safetensors")


def choose_models(
    settings: Settings, registry: ModelRegistry, tell: Callable[[str], None]
) -> tuple[ServeSettings, ...]:
    """What this node serves: its ``node.serve``, or else every linked model.

    With nothing linked the bundled tiny model is. A model of the ``echo`` engine needs no
    checkpoint and is linked by being named.

    Raises: ConfigurationError saying what to link or install.
    """
    if settings.node.serve:
        for entry in settings.node.serve:
            _require_linked(entry, registry, tell)
        return settings.node.serve
    records = registry.list() or [_link_tiny(registry, tell)]
    return tuple(
        ServeSettings(model=record.name, engine=record.engine or DEFAULT_ENGINE)
        for record in records
    )


def engine_spec(
    entry: ServeSettings, record: ModelRecord, memory_share: float | None = None
) -> EngineSpec:
    """What one replica is started with; ``memory_share`` of its GPUs is its own."""
    return EngineSpec(
        model=record.name,
        path=record.path,
        trust_remote_code=record.trust_remote_code,
        session_len=entry.session_len,
        max_running=count_running(entry),
        options=entry.options,
        memory_share=memory_share,
    )


def _require_linked(
    entry: ServeSettings, registry: ModelRegistry, tell: Callable[[str], None]
) -> None:
    linked = {record.name for record in registry.list()}
    if entry.model in linked:
        return
    if entry.engine == "echo":
        registry.link(entry.model, None, engine="echo")
        tell(f"linked {entry.model} (echo engine: it repeats what it is asked)")
    elif entry.model == TINY_NAME:
        _link_tiny(registry, tell)
    else:
        raise ConfigurationError(
            f"node.serve names the model '{entry.model}', which is not linked; "
            f"link it first: vlmq models link {entry.model} /path/to/checkpoint"
        )


def _link_tiny(registry: ModelRegistry, tell: Callable[[str], None]) -> ModelRecord:
    missing = [name for name in _TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]
    if missing or not (TINY_CHECKPOINT / "config.json").is_file():
        reason = (
            f"the bundled tiny model needs {', '.join(missing)}: pip install 'vlmq[cpu]'"
            if missing
            else "this installation does not carry the bundled tiny model"
        )
        raise ConfigurationError(
            f"no model is linked, and {reason}. Or link one of yours (vlmq models link NAME PATH), "
            "or try everything without a model: vlmq up --engine echo"
        )
    record = registry.link(
        TINY_NAME,
        TINY_CHECKPOINT,
        engine=DEFAULT_ENGINE,
        owner="vlmq",
        defaults=ModelDefaults(temperature=0),
    )
    tell(f"linked the bundled model {TINY_NAME}, which describes drawings of two shapes")
    return record
