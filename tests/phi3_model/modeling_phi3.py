"""Phi-3 with the attention of its published code: eager, with angles of its own in each layer.

Everything else is transformers'. Classes, attributes and signatures that a replacement of the
attention relies on are named as in the published code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.phi3 import modeling_phi3 as native


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys ``[b, heads, n, d]`` by angles ``[b, n, d]``."""
    del position_ids  # the angles are those of the positions already

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    return turned(q), turned(k)


class Phi3RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions that are given."""

    def __init__(self, size: int, base: float) -> None:
        super().__init__()
        self.size = size
        self.base = base

    def forward(
        self, x: Tensor, position_ids: Tensor, seq_len: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two tensors ``[b, n, d]``."""
        del seq_len
        steps = torch.arange(0, self.size, 2, device=x.device).float() / self.size
        angles = position_ids[..., None].float() * self.base**-steps
        doubled = torch.cat([angles, angles], dim=-1)
        return doubled.cos().to(x.dtype), doubled.sin().to(x.dtype)


class Phi3Attention(nn.Module):
    """Attention that keeps a matrix of all pairs of tokens."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.qkv_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.rotary_emb = Phi3RotaryEmbedding(self.head_dim, config.rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """``[b, n, hidden]`` to the same shape."""
        assert position_ids is not None
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split(
            (self.num_heads, self.num_key_value_heads, self.num_key_value_heads), dim=1
        )
        cos, sin = self.rotary_emb(value, position_ids, seq_len=value.shape[2])
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        weights = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
        seen = (weights @ value).transpose(1, 2).flatten(2)
        return self.o_proj(seen), weights if output_attentions else None, past_key_value


class Phi3DecoderLayer(native.Phi3DecoderLayer):  # type: ignore[misc]
    """A decoder layer around that attention."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = Phi3Attention(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *given: Any,
        **named: Any,
    ) -> tuple[Tensor]:
        """``[b, n, hidden]`` to the same shape."""
        del given, named  # a past and what transformers' own attention wants
        seen, _, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=None,
            output_attentions=False,
            use_cache=False,
        )
        x = hidden_states + self.resid_attn_dropout(seen)
        return (x + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(x))),)


class Phi3Model(native.Phi3Model):  # type: ignore[misc]
    """Phi-3 without its head."""

    _supports_sdpa = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            Phi3DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class Phi3ForCausalLM(native.Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 with its head."""

    _supports_sdpa = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Phi3Model(config)
        self.post_init()

    def forward(self, *given: Any, **named: Any) -> Any:
        """Logits in float32, as the published code gives them; transformers' are in bfloat16."""
        out = super().forward(*given, **named)
        out.logits = out.logits.float()
        return out
