"""InternVL2 around Phi-3: the class that transformers loads from a checkpoint's folder."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

# transformers copies what this file imports from beside it, and not what those files do.
from .config import vision_part
from .configuration_internvl_chat import InternVisionConfig
from .configuration_phi3_chat import Phi3ChatConfig
from .model import pixel_shuffle
from .modeling_internvl_chat import InternVisionModel
from .modeling_phi3 import Phi3ForCausalLM


class Phi3ChatModel(PreTrainedModel):  # type: ignore[misc]
    """A ViT, a projector and Phi-3."""

    config_class = Phi3ChatConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_flash_attn_2 = True
    _no_split_modules = ["VisionLayer", "Phi3DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: Phi3ChatConfig) -> None:
        super().__init__(config)
        self.downsample_ratio = config.downsample_ratio
        vision: InternVisionConfig = config.vision_config
        self.patches = vision_part(vision.to_dict()).patches
        self.vision_model = InternVisionModel(vision)
        self.language_model = Phi3ForCausalLM(config.llm_config)
        folded = vision.hidden_size * int(1 / self.downsample_ratio) ** 2
        hidden = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(folded), nn.Linear(folded, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.img_context_token_id: int | None = None

    def _init_weights(self, module: nn.Module) -> None:
        """Random weights are drawn by the two towers and by torch."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        out: nn.Module = self.language_model.get_input_embeddings()
        return out

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Tiles ``[n, 3, side, side]`` to ``[n, tokens of a tile, hidden]``."""
        seen = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        square = seen.unflatten(1, (self.patches, self.patches))
        folded = pixel_shuffle(square, self.downsample_ratio)
        out: Tensor = self.mlp1(folded.flatten(1, 2))
        return out
