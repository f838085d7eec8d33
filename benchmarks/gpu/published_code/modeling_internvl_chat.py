"""InternVL2 around the published code of its two towers, for benchmarks of stock training.

Copied into a model folder by ``benchmarks.gpu.published``; transformers imports it from there. What
it does is what the published file does as far as xtuner calls it: features of the tiles, and eager
attention in the language model where flash-attn is not installed.
"""

# The names are those of the published checkpoints.
# ruff: noqa: RUF012

from __future__ import annotations

import importlib.util

from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_internvl_chat import InternVLChatConfig
from .modeling_intern_vit import InternVisionModel
from .modeling_internlm2 import InternLM2ForCausalLM


class InternVLChatModel(PreTrainedModel):
    """A ViT, a projector and a language model."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_flash_attn_2 = True
    _no_split_modules = ["InternVisionModel", "InternLM2DecoderLayer"]

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        has_flash = importlib.util.find_spec("flash_attn") is not None
        config.llm_config.attn_implementation = "flash_attention_2" if has_flash else "eager"
        self.downsample_ratio = config.downsample_ratio
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = InternLM2ForCausalLM(config.llm_config)
        folded = config.vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        hidden = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(folded), nn.Linear(folded, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.img_context_token_id: int | None = None

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Tiles ``[n, 3, side, side]`` to ``[n, tokens of a tile, hidden]``."""
        seen = self.vision_model(
            pixel_values=pixel_values, output_hidden_states=False, return_dict=True
        ).last_hidden_state[:, 1:]
        side = int(seen.shape[1] ** 0.5)
        folded = self.pixel_shuffle(seen.unflatten(1, (side, side)))
        out: Tensor = self.mlp1(folded.flatten(1, 2))
        return out

    def pixel_shuffle(self, patches: Tensor) -> Tensor:
        """Fold neighbouring patches into channels: ``[n, h, w, c]`` to ``[n, h/2, w/2, 4c]``."""
        count, height, width, channels = patches.shape
        step = int(1 / self.downsample_ratio)
        rows = patches.reshape(count, height, width // step, channels * step).transpose(1, 2)
        square = rows.reshape(count, width // step, height // step, channels * step * step)
        return square.transpose(1, 2).contiguous()
