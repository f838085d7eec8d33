"""The network itself: InternViT, the pixel-shuffle projector and InternLM2, in plain torch.

Parameter names are the published ones, so a published state dict loads as it is. How queries
meet keys is the caller's choice (:class:`Attend`): training, prefill and decoding differ in
nothing else. This module knows no prompts, tokenizers or sampling.

Source: the InternVL2 and InternLM2 checkpoints as published, and their papers
(arXiv 2312.14238, 2404.16821, 2403.17297).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .config import LanguageConfig, ModelConfig, VisionConfig


class Attend(Protocol):
    """Let queries ``[b, heads, n, d]`` meet keys and values ``[b, kv_heads, n, d]`` of a layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return what was attended to, ``[b, heads, n, d]``."""
        ...


def attend_causally(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 - an Attend
    """Each token sees itself and those before it; right padding needs no mask."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


# --- InternViT --------------------------------------------------------------------------------


class VisionEmbeddings(nn.Module):
    """Patches, the class token and learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(
            torch.zeros(1, config.patches**2 + 1, config.hidden_size)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, side, side]`` to ``[n, 1 + patches, hidden]``."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1).to(patches.dtype)
        return torch.cat([first, patches], dim=1) + self.position_embedding.to(patches.dtype)


class VisionAttention(nn.Module):
    """Full attention among the patches of one tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)
        self.normalized = config.qk_normalization
        if self.normalized:
            self.q_norm = RMSNorm(size, config.layer_norm_eps)
            self.k_norm = RMSNorm(size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, hidden]`` to the same shape."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        if self.normalized:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        ]
        seen = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        projected: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return projected


class VisionMlp(nn.Module):
    """The feed-forward part of a ViT layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, hidden]`` to the same shape."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class VisionLayer(nn.Module):
    """A ViT layer with layer scale (``ls1``, ``ls2``)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)
        self.norm1 = _vision_norm(config)
        self.norm2 = _vision_norm(config)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, hidden]`` to the same shape."""
        x = x + self.attn(self.norm1(x)) * self.ls1
        out: Tensor = x + self.mlp(self.norm2(x)) * self.ls2
        return out


def _vision_norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class VisionEncoder(nn.Module):
    """The stack of ViT layers."""

    gradient_checkpointing = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Run the first ``depth`` layers (all when None)."""
        for layer in self.layers[:depth]:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


class VisionTransformer(nn.Module):
    """InternViT: tiles to patch features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, pixels: Tensor, select_layer: int = -1) -> Tensor:
        """``[n, 3, side, side]`` to ``[n, 1 + patches, hidden]``, read after ``select_layer``."""
        states = len(self.encoder.layers) + 1
        out: Tensor = self.encoder(self.embeddings(pixels), select_layer % states)
        return out


# --- InternLM2 --------------------------------------------------------------------------------


class RotaryAngles(nn.Module):
    """Cosines and sines of rotary position embeddings, computed in float32."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.size = config.head_size
        self.theta = config.rope_theta
        self.factor = config.rope_scaling_factor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions ``[b, n]`` to two tensors ``[b, 1, n, head_size]``."""
        # Computed on each call: a stored buffer would follow the model's cast to bfloat16.
        steps = torch.arange(0, self.size, 2, device=positions.device, dtype=torch.float32)
        inverse = self.theta ** (-steps / self.size)
        angles = (positions.float() / self.factor)[:, None, :, None] * inverse
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the halves of the last dimension against each other."""
    low, high = x.chunk(2, dim=-1)
    return x * angles[0] + torch.cat([-high, low], dim=-1) * angles[1]


class LanguageAttention(nn.Module):
    """Grouped-query attention; ``wqkv`` interleaves each group's queries with its key and value."""

    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_size = config.head_size
        self.kv_heads = config.num_key_value_heads
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        width = (config.num_attention_heads + 2 * self.kv_heads) * self.head_size
        self.wqkv = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """``[b, n, hidden]`` to the same shape."""
        groups = self.wqkv(x).unflatten(
            -1, (self.kv_heads, self.queries_per_key + 2, self.head_size)
        )
        query = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key = groups[..., -2, :].transpose(1, 2)
        value = groups[..., -1, :].transpose(1, 2)
        seen = attend(self.index, rotate(query, angles), rotate(key, angles), value)
        out: Tensor = self.wo(seen.transpose(1, 2).flatten(2))
        return out


class LanguageMlp(nn.Module):
    """The gated feed-forward part of a decoder layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, n, hidden]`` to the same shape."""
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


class LanguageLayer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: LanguageConfig, index: int) -> None:
        super().__init__()
        self.attention = LanguageAttention(config, index)
        self.feed_forward = LanguageMlp(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """``[b, n, hidden]`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), angles, attend)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    """InternLM2 without its head."""

    gradient_checkpointing = False

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LanguageLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryAngles(config)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embeddings ``[b, n, hidden]`` at ``positions [b, n]`` to the last hidden states."""
        angles = self.rotary(positions, x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, angles, attend, use_reentrant=False)
            else:
                x = layer(x, angles, attend)
        out: Tensor = self.norm(x)
        return out


class LanguageModel(nn.Module):
    """InternLM2: embeddings to logits."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[…]`` to embeddings ``[…, hidden]``."""
        out: Tensor = self.model.tok_embeddings(tokens)
        return out

    def forward(
        self, x: Tensor, positions: Tensor | None = None, attend: Attend = attend_causally
    ) -> Tensor:
        """Embeddings ``[b, n, hidden]`` to logits ``[b, n, vocab]`` in float32."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        out: Tensor = self.output(self.model(x, positions, attend)).float()
        return out


# --- the whole --------------------------------------------------------------------------------


def pixel_shuffle(x: Tensor, ratio: float, version: str = "v2") -> Tensor:
    """Fold neighbouring patches into channels: ``[n, h, w, c]`` to ``[n, h/2, w/2, 4c]`` at 0.5.

    Version ``v1`` leaves height and width swapped, as the oldest checkpoints were trained.
    """
    count, height, width, channels = x.shape
    x = x.reshape(count, height, int(width * ratio), int(channels / ratio))
    x = x.permute(0, 2, 1, 3)
    x = x.reshape(count, int(width * ratio), int(height * ratio), int(channels / (ratio * ratio)))
    return x if version == "v1" else x.permute(0, 2, 1, 3)


def projector(config: ModelConfig) -> nn.Sequential:
    """The MLP between the towers; its members are published as ``mlp1.0``, ``.1`` and ``.3``."""
    folded = config.vision.hidden_size * int(1 / config.downsample_ratio) ** 2
    hidden = config.language.hidden_size
    return nn.Sequential(
        nn.LayerNorm(folded), nn.Linear(folded, hidden), nn.GELU(), nn.Linear(hidden, hidden)
    )


class InternVL(nn.Module):
    """An InternVL2 model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config.vision)
        self.mlp1 = projector(config)
        self.language_model = LanguageModel(config.language)

    def extract_feature(self, pixels: Tensor) -> Tensor:
        """Normalized tiles ``[n, 3, side, side]`` to ``[n, tokens_per_tile, hidden]``."""
        seen = self.vision_model(pixels, self.config.select_layer)[:, 1:]
        side = self.config.vision.patches
        square = seen.unflatten(1, (side, side))
        folded = pixel_shuffle(square, self.config.downsample_ratio, self.config.ps_version)
        out: Tensor = self.mlp1(folded.flatten(1, 2))
        return out
