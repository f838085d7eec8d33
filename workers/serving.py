"""Which models a node serves, and with what: configured, linked, or the bundled tiny one.

``choose_models`` is asked once, before anything starts, so that what is missing is said at once and
in full. ``serve_now`` is asked again whenever the registry changes, by the fleet and by the
consumers, which so agree on what is served without talking to each other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shared.errors import ConfigurationError
from shared.models import ModelDefaults, ModelRecord, ModelRegistry
from shared.settings import ServeSettings, Settings
from workers.inference.engines.base import EngineSpec
from workers.placement import count_running, gpus_of
from workers.residency import EPSILON

TINY_NAME = "tiny-internvl2"
TINY_CHECKPOINT = Path(__file__).parent / "inference" / "tiny" / "checkpoint"
DEFAULT_ENGINE = "transformers"
_TRANSFORMERS_NEEDS = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Served:
    """One model that this node serves now.

    ``entry.load`` is ``on_demand`` for a tuned model, and for a base that has to make room for one.
    """

    entry: ServeSettings
    record: ModelRecord
    root: str
    """The model whose entry of ``node.serve`` this follows: itself, or what it was tuned from."""
    eager: bool
    """Loaded without being asked for, where there is room."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.record.name

    @property
    def tuned(self) -> bool:
        """Whether it is served because its base is."""
        return self.root != self.name

    @property
    def build(self) -> ModelRecord:
        """The record as far as engines are concerned: they are replaced only if this changes."""
        return msgspec.structs.replace(
            self.record,
            engine=self.entry.engine,
            owned_by="",
            defaults=ModelDefaults(),
            visible_to=None,
            source=None,
            base=None,
            job=None,
            candidate=False,
        )


def serve_now(
    configured: Sequence[ServeSettings], records: Mapping[str, ModelRecord]
) -> dict[str, Served]:
    """What a node with this ``node.serve`` serves while the registry holds ``records``, by name.

    Without ``configured`` every linked model is served, with the engine it was linked with. A model
    that was tuned from another is served like that one, but loaded on demand; if it does not fit
    beside what is always loaded, its base is evictable, too.
    """
    entries = {entry.model: entry for entry in own_entries(configured, records)}
    served = {
        name: Served(entry, records[name], name, eager=entry.load == "always")
        for name, entry in entries.items()
        if name in records
    }
    for name in sorted(records.keys() - entries.keys()):
        root = _root(name, entries, records)
        if root is not None:
            entry = entries[root].model_copy(update={"model": name, "load": "on_demand"})
            served[name] = Served(entry, records[name], root, eager=False)
    for name in _yielding(served):
        one = served[name]
        entry = one.entry.model_copy(update={"load": "on_demand"})
        served[name] = Served(entry, one.record, one.root, one.eager)
    return served


def own_entries(
    configured: Sequence[ServeSettings], records: Mapping[str, ModelRecord]
) -> tuple[ServeSettings, ...]:
    """The entries that follow no other: ``node.serve``, or else one for each linked base."""
    if configured:
        return tuple(configured)
    return tuple(
        ServeSettings(model=name, engine=record.engine or DEFAULT_ENGINE)
        for name, record in sorted(records.items())
        if record.base not in records
    )


def _root(name: str, roots: Iterable[str], records: Mapping[str, ModelRecord]) -> str | None:
    """The first of ``roots`` on the way from ``name`` to what it was tuned from, and so on."""
    seen: set[str] = set()
    at: str | None = name
    while at is not None and at not in seen:
        if at in roots:
            return at
        seen.add(at)
        record = records.get(at)
        at = None if record is None else record.base
    return None


def _yielding(served: Mapping[str, Served]) -> set[str]:
    """The always loaded bases beside which some model tuned from them has no room."""
    always = [one.entry for one in served.values() if one.entry.load == "always"]
    found: set[str] = set()
    for one in served.values():
        base = served.get(one.root)
        if not one.tuned or base is None or base.entry.load != "always":
            continue
        for gpu in gpus_of(one.entry):
            taken = sum(entry.gpu_share for entry in always if gpu in gpus_of(entry))
            if taken + one.entry.gpu_share > 1 + EPSILON:
                found.add(one.root)
    return found


def choose_models(
    settings: Settings, registry: ModelRegistry, tell: Callable[[str], None]
) -> tuple[ServeSettings, ...]:
    """What this node serves from the start, tuned models apart: ``node.serve`` or what is linked.

    With nothing linked the bundled tiny model is. A model of the ``echo`` engine needs no
    checkpoint and is linked by being named.

    Raises: ConfigurationError saying what to link or install.
    """
    for entry in settings.node.serve:
        _require_linked(entry, registry, tell)
    if not settings.node.serve and not registry.list():
        _link_tiny(registry, tell)
    return own_entries(settings.node.serve, registry.by_name())


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
