"""The model classes that transformers loads from a checkpoint that carries its own code.

They wrap ``model`` in the interface of the published code: ``extract_feature``, and a
``language_model`` that takes embeddings, masks, positions and past keys and values.
"""

# The parameters are those by which transformers calls.
# ruff: noqa: FBT001, FBT002, RUF012

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .config import language_part, parse_config, vision_part
from .configuration_internvl_chat import InternLM2Config, InternVisionConfig, InternVLChatConfig
from .model import (
    Decoder,
    VisionEmbeddings,
    VisionEncoder,
    attend_causally,
    pixel_shuffle,
    projector,
)

Past = tuple[tuple[Tensor, Tensor], ...]
IGNORED = -100


class _Pretrained(PreTrainedModel):  # type: ignore[misc]
    """What the three models have in common."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn_2 = True  # accepted and answered with torch's own attention

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            module.weight.data.normal_(std=0.02)


class InternVisionModel(_Pretrained):
    """InternViT."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["VisionLayer"]

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        shape = vision_part(config.to_dict())
        self.embeddings = VisionEmbeddings(shape)
        self.encoder = VisionEncoder(shape)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embeddings."""
        return self.embeddings

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = True,
        depth: int | None = None,
    ) -> BaseModelOutputWithPooling:
        """Tiles ``[n, 3, side, side]`` to the states after ``depth`` layers (all when None)."""
        states = self.encoder(self.embeddings(pixel_values.to(self.dtype)), depth)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


class InternLM2ForCausalLM(_Pretrained, GenerationMixin):  # type: ignore[misc]
    """InternLM2 with its head."""

    config_class = InternLM2Config
    _no_split_modules = ["LanguageLayer"]
    _tied_weights_keys: list[str] = []

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        shape = language_part(config.to_dict())
        self.model = Decoder(shape)
        self.output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = True,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens or embeddings ``[b, n, …]`` to logits in float32, and the past when asked."""
        if inputs_embeds is None:
            inputs_embeds = self.model.tok_embeddings(input_ids)
        attention = _Attention(past_key_values, attention_mask, keep=bool(use_cache))
        if position_ids is None:
            first = attention.past_length
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(first, first + length, device=inputs_embeds.device)[None]
        hidden = self.model(inputs_embeds, position_ids, attention)
        logits = self.output(hidden).float()
        return CausalLMOutputWithPast(
            loss=None if labels is None else _next_token_loss(logits, labels),
            logits=logits,
            past_key_values=attention.present if use_cache else None,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **given: Any
    ) -> dict[str, Any]:
        """Generation goes through the serving engine; this is for wrappers that ask for it."""
        return {"input_ids": input_ids, "past_key_values": past_key_values, **given}


class InternVLChatModel(_Pretrained):
    """InternVL2."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["VisionLayer", "LanguageLayer"]

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.shape = parse_config(config.to_dict())
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = InternLM2ForCausalLM(config.llm_config)
        self.mlp1 = projector(self.shape)
        self.num_image_token = self.shape.tokens_per_tile
        self.img_context_token_id: int | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.language_model.get_input_embeddings()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Normalized tiles ``[n, 3, side, side]`` to ``[n, tokens_per_tile, hidden]``."""
        depth = self.shape.select_layer % (self.shape.vision.num_hidden_layers + 1)
        seen = self.vision_model(pixel_values, depth=depth).last_hidden_state[:, 1:]
        side = self.shape.vision.patches
        square = seen.unflatten(1, (side, side))
        folded = pixel_shuffle(square, self.shape.downsample_ratio, self.shape.ps_version)
        out: Tensor = self.mlp1(folded.flatten(1, 2))
        return out

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = True,
    ) -> CausalLMOutputWithPast:
        """Put the tiles' features where ``input_ids`` hold ``img_context_token_id``.

        ``image_flags [tiles]`` are 0 for tiles that only fill up text samples.
        """
        embeds = self.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)
        if image_flags is not None:
            features = features[image_flags.flatten() == 1]
        embeds[input_ids == self.img_context_token_id] = features.flatten(0, 1).to(embeds.dtype)
        out: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
        )
        return out


class _Attention:
    """Attends over past and present keys under a mask ``[b, past + n]`` of real tokens."""

    def __init__(self, past: Past | None, mask: Tensor | None, *, keep: bool) -> None:
        self._past = past
        self._mask = mask
        self._keep = keep
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.past_length = past[0][0].shape[2] if past else 0
        # Padding on the right is never seen by a real token: the causal order is mask enough.
        self._is_plain = past is None and (
            mask is None or bool((mask[:, :-1] >= mask[:, 1:]).all())
        )

    @property
    def present(self) -> Past:
        """Keys and values, past and new, of every layer."""
        return tuple(self._kept)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._past is not None:
            key = torch.cat([self._past[layer][0], key], dim=2)
            value = torch.cat([self._past[layer][1], value], dim=2)
        if self._keep:
            self._kept.append((key, value))
        if self._is_plain:
            return attend_causally(layer, query, key, value)
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self._visible(query, key),
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        asked, held = query.shape[2], key.shape[2]
        causal = torch.ones(asked, held, dtype=torch.bool, device=query.device)
        visible = causal.tril(held - asked)[None, None]
        if self._mask is None:
            return visible
        # A padded token sees itself, because a row that sees nothing becomes NaN.
        itself = torch.eye(held, dtype=torch.bool, device=query.device)[held - asked :]
        return visible & self._mask[:, None, None, :held].bool() | itself


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
