"""Which base models can be fine-tuned, seen from a checkpoint's ``config.json`` alone.

The trainer's dataset knows how two families of language models mark the turns of a conversation;
with any other it would train on text in the wrong form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.checkpoints import CONFIG, own_code, read_object
from shared.errors import InvalidValue, RemoteCodeRefused
from shared.models import ModelRecord

ARCHITECTURE = "InternVLChatModel"
LANGUAGE_MODELS = {"InternLM2ForCausalLM": "InternLM2", "Phi3ForCausalLM": "Phi-3"}
TRAINED_SYSTEM = {
    "InternLM2ForCausalLM": "You are an AI assistant whose name is InternLM (书生·浦语).",
    "Phi3ForCausalLM": "You are an AI assistant whose name is Phi-3.",
}
"""The system message that xtuner puts before every row of these families."""
WHAT_WORKS = (
    "fine-tuning takes InternVL models whose language model is InternLM2 (InternVL2-2B, -8B, -26B) "
    "or Phi-3 (InternVL2-4B)"
)


def require_tunable(model: str, folder: Path) -> str:
    """The architecture of the language model inside the checkpoint ``folder``.

    Raises: InvalidValue for ``model``, saying what works, if it cannot be tuned; CheckpointInvalid
    if its config cannot be read.
    """
    config = read_object(folder / CONFIG)
    found = _first(config.get("architectures"))
    if found != ARCHITECTURE:
        raise _refused(model, f"is a {found or 'model without an architecture'}")
    part = config.get("llm_config")
    language = _first(part.get("architectures")) if isinstance(part, dict) else None
    if language not in LANGUAGE_MODELS:
        raise _refused(model, f"has the language model {language or '(none named)'}")
    return language


def require_consent(record: ModelRecord) -> None:
    """Refuse a base whose own code training would run without consent. Raises: RemoteCodeRefused."""
    if record.path is None or record.trust_remote_code:
        return
    code = own_code(Path(record.path))
    if code is not None:
        raise RemoteCodeRefused(
            f"the model '{record.name}' carries code of its own ({code}), which training would run; "
            "read it, and if you trust it link the model again with --replace --trust-remote-code",
            param="model",
        )


def _first(architectures: Any) -> str | None:
    names = architectures if isinstance(architectures, list) else []
    return names[0][:100] if names and isinstance(names[0], str) else None


def _refused(model: str, reason: str) -> InvalidValue:
    return InvalidValue(f"the model '{model}' {reason}; {WHAT_WORKS}", param="model")
