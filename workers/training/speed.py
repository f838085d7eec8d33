"""Makes a model compute faster without computing anything else.

The published code of InternLM2, Phi-3 and InternViT attends eagerly where flash-attn is not installed: it
keeps a matrix of all pairs of tokens per head. PyTorch's own attention gives the same numbers but
for rounding. Right-padded batches need no mask under a causal order: padding comes last, so no
token that counts sees it.
"""

# Functions that take a method's place have its signature.
# ruff: noqa: ARG001, FBT001, FBT002

from __future__ import annotations

import inspect
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.nn import functional

from workers.training.features import can_cache, fill_cache, read_features_only
from workers.training.logits import compute_labelled_only
from workers.training.orders import Speed
from workers.training.samples import StrictSamples

_LANGUAGE_ATTENTION = frozenset({"InternLM2Attention", "InternLM2FlashAttention2"})
_PHI3_ATTENTION = frozenset({"Phi3Attention", "Phi3FlashAttention2"})
_VISION_ATTENTION = "InternAttention"
_LANGUAGE_DECODER = "InternLM2Model"
_MASK_MAKERS = ("_prepare_decoder_attention_mask", "_update_causal_mask")
"""Of the code that InternVL2-2B was published with, and of InternLM2.5's, which others carry."""


class SpeedHook(Hook):  # type: ignore[misc]
    """Applies what was chosen, once the model is loaded and wrapped."""

    priority = "VERY_HIGH"

    def __init__(self, speed: Speed) -> None:
        self._speed = speed

    def before_train(self, runner: Any) -> None:
        """Called when everything is loaded."""
        model = runner.model.module
        replaced = use_sdpa(model) if self._speed.attention == "sdpa" else 0
        set_checkpointing(model, on=self._speed.gradient_checkpointing)
        labelled = self._speed.labelled_logits and compute_labelled_only(model)
        self._cache_features(runner, model)
        runner.logger.info(
            "PyTorch's attention in %d modules; gradient checkpointing %s; logits of %s tokens",
            replaced,
            "on" if self._speed.gradient_checkpointing else "off",
            "labelled" if labelled else "all",
        )

    def _cache_features(self, runner: Any, model: nn.Module) -> None:
        folder = self._speed.cached_features
        loader = runner.train_dataloader
        if folder is None or not isinstance(loader.dataset, StrictSamples):
            return
        if not can_cache(model):
            runner.logger.warning("The ViT is trained or drops at random: no features are cached")
            return
        started = time.monotonic()
        cache = fill_cache(model, loader.dataset, Path(folder), loaders=loader.num_workers)
        loader.dataset.features = cache
        read_features_only(model)
        runner.logger.info("Features are cached after %.1f s", time.monotonic() - started)


def use_sdpa(model: nn.Module) -> int:
    """Replace eager attention by PyTorch's; returns in how many modules. Others stay as they are."""
    count = 0
    for module in model.modules():
        name = type(module).__name__
        if name in _LANGUAGE_ATTENTION:
            module.forward = types.MethodType(_language_attention, module)
        elif name in _PHI3_ATTENTION and _is_published_phi3(module):
            module.forward = types.MethodType(_phi3_attention, module)
        elif name == _VISION_ATTENTION:
            module.forward = types.MethodType(_vision_attention, module)
        elif name == _LANGUAGE_DECODER:
            for maker in _MASK_MAKERS:
                if hasattr(module, maker):
                    setattr(module, maker, _no_mask)
            continue
        else:
            continue
        count += 1
    return count


def set_checkpointing(model: Any, *, on: bool) -> None:
    """Turn gradient checkpointing of both towers on or off.

    The published ViT checkpoints by torch's reentrant way, which gives no gradients at all when its
    input needs none, as pixels do: then LoRA on the ViT would learn nothing, without a word. So its
    embeddings are made to need one where something in the ViT is trained.
    """
    language, vision = model.model.language_model, model.model.vision_model
    if on:
        language.gradient_checkpointing_enable()
    else:
        language.gradient_checkpointing_disable()
    trained = any(parameter.requires_grad for parameter in vision.parameters())
    for module in vision.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on and trained
    if on and trained:
        for module in _embeddings(vision):
            module.register_forward_hook(_require_gradient)


def _embeddings(vision: nn.Module) -> Iterator[nn.Module]:
    for name, module in vision.named_modules():
        if name.rpartition(".")[2] == "embeddings":
            yield module


def _require_gradient(module: nn.Module, given: Any, out: Any) -> None:
    if not out.requires_grad:
        out.requires_grad_()


def _no_mask(*given: Any, **named: Any) -> None:
    """The causal order is mask enough."""


def _language_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **rest: Any,
) -> tuple[Tensor, None, None]:
    """``[b, n, hidden]`` to the same shape; for training, so without a past."""
    _require_no_past(past_key_value, use_cache=use_cache)
    groups = self.wqkv(hidden_states).unflatten(
        -1, (self.num_key_value_heads, self.num_key_value_groups + 2, self.head_dim)
    )
    query = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
    key = groups[..., -2, :].transpose(1, 2)
    value = groups[..., -1, :].transpose(1, 2)
    return self.wo(_attend(self, query, key, value, position_ids)), None, None


def _is_published_phi3(module: Any) -> bool:
    """Whether it is of the code that came with InternVL2-4B, and looks back without a limit.

    transformers' own Phi-3 has classes of the same names, which use PyTorch's attention already.
    """
    if not hasattr(module, "num_heads") or not hasattr(module, "rotary_emb"):
        return False
    config = module.config
    window = getattr(config, "sliding_window", None)
    return window is None or window >= config.max_position_embeddings


def _phi3_attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **rest: Any,
) -> tuple[Tensor, None, None]:
    """``[b, n, hidden]`` to the same shape; for training, so without a past."""
    _require_no_past(past_key_value, use_cache=use_cache)
    heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
    query, key, value = heads.split(
        (self.num_heads, self.num_key_value_heads, self.num_key_value_heads), dim=1
    )
    return self.o_proj(_attend(self, query, key, value, position_ids)), None, None


def _require_no_past(past: Any, *, use_cache: bool) -> None:
    if past is not None or use_cache:
        raise RuntimeError("attention for training keeps no past; set use_cache to False")


def _attend(
    self: Any, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None
) -> Tensor:
    """Turn and attend: ``[b, heads, n, d]`` each to ``[b, n, heads * d]``."""
    cosine, sine = _angles(self.rotary_emb, value, positions)
    # The way of turning is part of the checkpoint's own code.
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, cosine, sine, positions)
    dropout = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
    seen = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        enable_gqa=self.num_key_value_groups > 1,
    )
    return seen.transpose(1, 2).flatten(2)


def _angles(rotary: nn.Module, value: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines: of every position in InternVL2-2B's code, of those given in others."""
    named = inspect.signature(rotary.forward).parameters
    if "position_ids" in named:
        return rotary(value, positions)  # type: ignore[no-any-return]
    return rotary(value, seq_len=value.shape[-2])  # type: ignore[no-any-return]


def _vision_attention(self: Any, hidden_states: Tensor) -> Tensor:
    """``[tiles, tokens, hidden]`` to the same shape."""
    query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
    if self.qk_normalization:
        query, key = self.q_norm(query), self.k_norm(key)
    heads = [
        part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
    ]
    dropout = self.attn_drop.p if self.training else 0.0
    seen = functional.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], dropout_p=dropout, scale=self.scale
    )
    out: Tensor = self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))
    return out
