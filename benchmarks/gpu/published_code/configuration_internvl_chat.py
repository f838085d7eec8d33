"""The configuration of an InternVL2 folder that carries the published code of its two towers.

Copied into such a folder by ``benchmarks.gpu.published``; transformers imports it from there.
"""

# The parameters are those by which transformers calls.
# ruff: noqa: RUF012

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .configuration_intern_vit import InternVisionConfig
from .configuration_internlm2 import InternLM2Config


class InternVLChatConfig(PretrainedConfig):
    """Both towers' configurations and what joins them."""

    model_type = "internvl_chat"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": InternLM2Config}

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = InternLM2Config(**(llm_config or {}))
        rest.setdefault("tie_word_embeddings", False)
        super().__init__(**rest)

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it."""
        out: dict[str, Any] = super().to_dict()
        out["vision_config"] = self.vision_config.to_dict()
        out["llm_config"] = self.llm_config.to_dict()
        out["model_type"] = self.model_type
        return out
