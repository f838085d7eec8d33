"""The config classes that transformers loads from a checkpoint that carries its own code."""

# The parameters are those by which transformers calls.
# ruff: noqa: FBT001, FBT002, RUF012

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class InternVisionConfig(PretrainedConfig):  # type: ignore[misc]
    """InternViT's part of the config; its keys are those of the published checkpoints."""

    model_type = "intern_vit_6b"

    def __init__(self, hidden_size: int = 1024, image_size: int = 448, **rest: Any) -> None:
        self.hidden_size = hidden_size
        self.image_size = image_size
        super().__init__(**rest)


class InternLM2Config(PretrainedConfig):  # type: ignore[misc]
    """InternLM2's part of the config."""

    model_type = "internlm2"

    def __init__(
        self,
        hidden_size: int = 2048,
        vocab_size: int = 92553,
        tie_word_embeddings: bool = False,
        **rest: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class InternVLChatConfig(PretrainedConfig):  # type: ignore[misc]
    """The whole config. Made without arguments, as transformers does to compare, it is harmless."""

    model_type = "internvl_chat"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": InternLM2Config}

    def __init__(
        self,
        vision_config: dict[str, Any] | InternVisionConfig | None = None,
        llm_config: dict[str, Any] | InternLM2Config | None = None,
        **rest: Any,
    ) -> None:
        self.vision_config = _made(InternVisionConfig, vision_config)
        self.llm_config = _made(InternLM2Config, llm_config)
        rest.setdefault("tie_word_embeddings", False)
        super().__init__(**rest)

    def to_dict(self) -> dict[str, Any]:
        """The published form."""
        out: dict[str, Any] = super().to_dict()
        out["vision_config"] = self.vision_config.to_dict()
        out["llm_config"] = self.llm_config.to_dict()
        out["model_type"] = self.model_type
        return out


def _made(kind: type[Any], given: Any) -> Any:
    return given if isinstance(given, PretrainedConfig) else kind(**(given or {}))
