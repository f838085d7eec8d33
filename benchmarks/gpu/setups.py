"""How a node is configured for each backend: one small table, and ``--set`` to try another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.gpu.work import MODEL
from shared.errors import ConfigurationError

Sections = dict[str, dict[str, Any]]
"""Settings by section; ``serve`` is the model's entry of ``node.serve``."""

SETUPS: dict[str, Sections] = {
    # What a person gets who names the engine and the GPU, and nothing else.
    "turbomind": {
        "serve": {"engine": "lmdeploy", "replicas": 1, "options": {"backend": "turbomind"}}
    },
    # As many as "auto" would choose on a machine with 16 cores for each GPU.
    "pytorch": {"serve": {"engine": "lmdeploy", "replicas": 4, "options": {"backend": "pytorch"}}},
    # No model: the dry run.
    "echo": {"serve": {"engine": "echo", "replicas": 1, "max_running": 256}},
}
"""``replicas`` counts those of one GPU."""

_COMMON: Sections = {
    # A node that is stopped has nothing left to do here.
    "queue": {"drain_s": 3},
    "node": {"engine_wait_s": 120},
}


def setup_of(backend: str, gpus: Sequence[str], changes: Sequence[str] = ()) -> Sections:
    """The settings of a node with ``backend`` on ``gpus``.

    ``changes`` are ``SECTION.KEY=VALUE`` (``node.batch_processes=8``, ``serve.replicas=2``,
    ``serve.options.max_prefill_token_num=32768``), values in JSON or as plain text; with
    ``BACKEND:`` before it a change is for that backend alone.

    Raises: ConfigurationError naming the change that is wrong.
    """
    sections = copy.deepcopy({**_COMMON, **SETUPS[backend]})
    for change in changes:
        only, setting = _addressed(change)
        if only in {"", backend}:
            _apply(sections, setting)
    serve = sections["serve"]
    serve["model"] = MODEL
    if gpus:
        serve["gpus"] = list(gpus)
        serve["replicas"] *= len(gpus)
    return sections


def _addressed(change: str) -> tuple[str, str]:
    """The backend that a change is for, empty for all, and the change."""
    only, _, setting = change.partition(":")
    return (only, setting) if only in SETUPS else ("", change)


def _apply(sections: Sections, setting: str) -> None:
    key, separator, text = setting.partition("=")
    *path, name = key.split(".")
    if not separator or not path:
        raise ConfigurationError(f"--set {setting}: write SECTION.KEY=VALUE")
    place: dict[str, Any] = sections
    for part in path:
        place = place.setdefault(part, {})
    place[name] = _value(text)


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
