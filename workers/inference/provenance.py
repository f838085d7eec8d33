"""What a shard of a caption job came of: model, words, parameters, versions."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from shared.captions import CaptionSource
from shared.models import ModelDefaults, ModelRecord, ModelSource
from shared.quality import QualityGate
from shared.storage import storage_errors

MAX_SHOWN = 8192
"""Characters of a prompt that are repeated in every shard; of a longer one there is the digest."""
_WHOLE_BYTES = 1 << 20
_ENDS_BYTES = 1 << 16
_PACKAGES = ("vlmq", "pillow", "lmdeploy", "torch", "transformers")


class ShardProvenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """``fingerprint`` is of the checkpoint's files: names, sizes, and what small ones hold."""

    model: str
    model_revision: int
    engine: str | None
    fingerprint: str | None
    source: ModelSource | None
    prompt_sha256: str
    parameters: dict[str, Any]
    scaling: str
    versions: dict[str, str]
    prompt: str | None = None
    template: str | None = None
    system: str | None = None
    detail: str | None = None
    quality: QualityGate | None = None


def provenance_of(source: CaptionSource, record: ModelRecord, scaling: str) -> bytes:
    """The record of what is done now, as JSON. Raises: StorageFailed."""
    words = msgspec.json.encode([source.prompt, source.template, source.system])
    found = ShardProvenance(
        model=record.name,
        model_revision=record.revision,
        engine=record.engine,
        fingerprint=_fingerprint(record.path, record.revision),
        source=record.source,
        prompt_sha256=hashlib.sha256(words).hexdigest(),
        parameters=resolved_parameters(source, record.defaults),
        scaling=scaling,
        versions=_versions(),
        prompt=_shown(source.prompt),
        template=_shown(source.template),
        system=_shown(source.system),
        detail=source.detail,
        quality=source.quality,
    )
    return msgspec.json.encode(found)


def resolved_parameters(source: CaptionSource, defaults: ModelDefaults) -> dict[str, Any]:
    """The generation parameters as they are used: those asked for, else the model's."""
    asked = {
        "max_tokens": source.token_limit,
        "temperature": source.temperature,
        "top_p": source.top_p,
        "top_k": source.top_k,
        "repetition_penalty": source.repetition_penalty,
        "min_new_tokens": source.min_new_tokens,
        "stop": source.stop_strings or None,
        "seed": source.seed,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return {**msgspec.to_builtins(defaults), **given}


def _shown(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_SHOWN else None


@lru_cache(maxsize=64)
def _fingerprint(path: str | None, _revision: int) -> str | None:
    """Tells checkpoints apart without reading gigabytes; a new revision is looked at anew."""
    if path is None:
        return None
    digest = hashlib.sha256()
    folder = Path(path)
    with storage_errors(folder):
        for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
            size = file.stat().st_size
            digest.update(
                f"{file.relative_to(folder)}\0{size}\0".encode("utf-8", "surrogateescape")
            )
            with open(file, "rb") as stream:
                if size <= _WHOLE_BYTES:
                    digest.update(stream.read())
                else:
                    digest.update(stream.read(_ENDS_BYTES))
                    stream.seek(-_ENDS_BYTES, os.SEEK_END)
                    digest.update(stream.read())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """The versions of what is installed here; nothing is imported."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
