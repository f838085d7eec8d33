"""Which checkpoints can be fine-tuned, by what their config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CheckpointInvalid, InvalidValue, RemoteCodeRefused
from shared.models import ModelRecord
from shared.tunable import require_consent, require_tunable


def described(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def internvl(language: str) -> dict[str, Any]:
    """An InternVL with this language model."""
    part = {"architectures": [language]}
    return {"architectures": ["InternVLChatModel"], "llm_config": part}


@pytest.mark.parametrize("language", ["InternLM2ForCausalLM", "Phi3ForCausalLM"])
def test_two_families_of_language_models_can_be_tuned(tmp_path: Path, language: str) -> None:
    """InternLM2 and Phi-3, whose turns the trainer's dataset knows how to mark."""
    assert require_tunable("base", described(tmp_path, internvl(language))) == language


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (internvl("Qwen2ForCausalLM"), "Qwen2ForCausalLM"),
        ({"architectures": ["InternVLChatModel"]}, "none named"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "LlavaForConditionalGeneration"),
        ({"model_type": "internvl_chat"}, "without an architecture"),
        ({"architectures": "InternVLChatModel"}, "without an architecture"),
        ({"architectures": [1]}, "without an architecture"),
        ({"architectures": ["InternVLChatModel"], "llm_config": []}, "none named"),
    ],
)
def test_any_other_is_refused_with_what_works(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    """The message names what was found and what could be tuned instead."""
    with pytest.raises(InvalidValue) as refused:
        require_tunable("base", described(tmp_path, config))
    assert refused.value.param == "model"
    assert said in refused.value.message
    assert "InternLM2" in refused.value.message


def test_a_config_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A damaged file is another matter than another architecture."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointInvalid):
        require_tunable("base", tmp_path)


def _record(folder: Path, *, trusted: bool) -> ModelRecord:
    return ModelRecord("m", str(folder), None, trusted, created=0, owned_by="vlmq")


def test_code_of_a_base_runs_only_with_consent(tmp_path: Path) -> None:
    """Training would run it, whatever the engine that serves the base does."""
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "theirs.Model"}}')
    require_consent(_record(tmp_path, trusted=True))
    with pytest.raises(RemoteCodeRefused, match=r"auto_map.*--trust-remote-code"):
        require_consent(_record(tmp_path, trusted=False))


def test_a_base_without_code_needs_no_consent(tmp_path: Path) -> None:
    """It is trained with this project's own network."""
    (tmp_path / "config.json").write_text("{}")
    require_consent(_record(tmp_path, trusted=False))
