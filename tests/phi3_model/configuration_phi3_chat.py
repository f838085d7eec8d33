"""The config classes of a checkpoint that ``tests.phi3_model`` writes; they lie in its folder."""

from __future__ import annotations

from typing import Any

from transformers import Phi3Config, PretrainedConfig

from .configuration_internvl_chat import InternVisionConfig


class Phi3ChatConfig(PretrainedConfig):  # type: ignore[misc]
    """The whole config."""

    model_type = "internvl_chat"
    is_composition = True

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Phi3Config(**(llm_config or {}))
        rest.setdefault("tie_word_embeddings", False)
        super().__init__(**rest)

    def to_dict(self) -> dict[str, Any]:
        """The published form."""
        out: dict[str, Any] = super().to_dict()
        out["vision_config"] = self.vision_config.to_dict()
        out["llm_config"] = self.llm_config.to_dict()
        out["model_type"] = self.model_type
        return out
