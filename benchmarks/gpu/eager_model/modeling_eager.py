"""Model code that attends as the published one does without flash-attn: eagerly, mask and all.

This project's own model code already attends by PyTorch's operator, so it cannot show what replacing
the published attention is worth, nor that it changes nothing. Classes, attributes and signatures
that a replacement relies on are named as in the published code. This
file lies in a checkpoint folder (``add_eager_code``) beside the project's own network, which the rest
comes from.
"""

# The parameters are those by which transformers calls.
# ruff: noqa: FBT001, FBT002

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import LanguageConfig, VisionConfig, language_part
from .configuration_internvl_chat import InternVLChatConfig
from .model import LanguageMlp, RMSNorm, RotaryAngles, VisionEncoder
from .modeling_internvl_chat import InternLM2ForCausalLM, InternVLChatModel


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys ``[b, heads, n, d]``; ``cos`` and ``sin`` are ``[positions, d]``."""
    cosine, sine = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-high, low], dim=-1) * sine

    return turned(q), turned(k)


class InternLM2RotaryEmbedding(nn.Module):
    """Cosines and sines of all positions."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.angles = RotaryAngles(config)

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """Two tensors ``[seq_len, d]``."""
        cosine, sine = self.angles(torch.arange(seq_len, device=x.device)[None], x.dtype)
        return cosine[0, 0], sine[0, 0]


class InternLM2Attention(nn.Module):
    """Attention that keeps a matrix of all pairs of tokens, in float32 on the way."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_size
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.rotary_emb = InternLM2RotaryEmbedding(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """``[b, n, hidden]`` to the same shape."""
        batch, length, size = hidden_states.shape
        groups = self.wqkv(hidden_states).view(
            batch, length, self.num_key_value_heads, self.num_key_value_groups + 2, self.head_dim
        )
        query = groups[..., :-2, :].reshape(batch, length, self.num_heads, -1).transpose(1, 2)
        key, value = groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)
        cos, sin = self.rotary_emb(value, seq_len=length)
        assert position_ids is not None
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        weights = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        seen = (weights @ value).transpose(1, 2).reshape(batch, length, size)
        return self.wo(seen), weights if output_attentions else None, None


class InternLM2DecoderLayer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config)
        self.feed_forward = LanguageMlp(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """``[b, n, hidden]`` to the same shape."""
        x = (
            x
            + self.attention(self.attention_norm(x), attention_mask=mask, position_ids=positions)[0]
        )
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class InternLM2Model(nn.Module):
    """InternLM2 without its head."""

    gradient_checkpointing = False

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Embeddings ``[b, n, hidden]`` to the last hidden states."""
        added = self._prepare_decoder_attention_mask(mask, x.shape[:2], x, 0)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, added, positions, use_reentrant=True)
            else:
                x = layer(x, added, positions)
        out: Tensor = self.norm(x)
        return out

    def _prepare_decoder_attention_mask(
        self, attention_mask: Tensor | None, input_shape: Any, inputs_embeds: Tensor, past: int
    ) -> Tensor:
        """What is added to the weights, ``[b, 1, n, n]``: the lowest number where none may look."""
        length = input_shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=inputs_embeds.device).tril()
        visible = visible[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool()
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(~visible, lowest)


class EagerInternLM2ForCausalLM(InternLM2ForCausalLM):
    """InternLM2 with its head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = InternLM2Model(language_part(config.to_dict()))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens or embeddings to logits; for training, so without a past."""
        x = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        assert position_ids is not None
        hidden = self.model(x, attention_mask, position_ids)
        return CausalLMOutputWithPast(logits=self.output(hidden).float())


class InternAttention(nn.Module):
    """The ViT's attention."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (size // self.num_heads) ** -0.5
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(0.0)
        self.proj_drop = nn.Dropout(0.0)
        self.qk_normalization = config.qk_normalization
        if self.qk_normalization:
            self.q_norm = RMSNorm(size, config.layer_norm_eps)
            self.k_norm = RMSNorm(size, config.layer_norm_eps)
        self.proj = nn.Linear(size, size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[tiles, tokens, hidden]`` to the same shape."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        weights = self.attn_drop(((query * self.scale) @ key.transpose(2, 3)).softmax(dim=-1))
        out: Tensor = self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))
        return out


class InternVisionEncoder(VisionEncoder):
    """The ViT's layers; checkpoints gradients in torch's older way, as published."""

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Run the first ``depth`` layers (all when None)."""
        for layer in self.layers[:depth]:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, use_reentrant=True)
            else:
                x = layer(x)
        return x


class EagerInternVLChatModel(InternVLChatModel):
    """InternVL2."""

    config_class = InternVLChatConfig

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.language_model = EagerInternLM2ForCausalLM(config.llm_config)
        encoder = InternVisionEncoder(self.shape.vision)
        for layer in encoder.layers:
            layer.attn = InternAttention(self.shape.vision)
        encoder.gradient_checkpointing = True  # as published
        self.vision_model.encoder = encoder
        self.post_init()
