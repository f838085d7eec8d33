"""Writes models whose greedy answers are the same on every kernel, whatever else is computed.

An answer's first token is drawn by the prompt and its images, through one attention layer; each
later one follows its predecessor on a fixed round of word tokens, by a wide margin. Random weights
would not do: their likeliest tokens lie so close together that rounding decides between them.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from workers.inference.internvl.checkpoint import write_description, write_weights
from workers.inference.internvl.export import add_code
from workers.inference.internvl.synthesis import INTERNVL2_2B, shapes_of
from workers.inference.internvl.tokenizer import train_tokenizer

# Layers and heads as wide as InternVL2-2B's, so that the kernels are those of a real model.
WALKING = replace(
    INTERNVL2_2B,
    vision=replace(INTERNVL2_2B.vision, num_hidden_layers=2),
    language=replace(
        INTERNVL2_2B.language, vocab_size=2048, num_hidden_layers=6, intermediate_size=4096
    ),
)
WORDS = (
    "user assistant a red circle left of a blue square on a plain white ground with a thin frame "
    "circle number word what is in this image describe beside green and the rest "
)

DIGITS = "0123456789"
SEED = 0
"""With it the contract suite's prompts choose their first token by a clear margin."""

_DIGIT_GAIN = 20.0
_ATTENTION = 0.3
"""How much of the context reaches the residual, against an embedding of size 1 a channel."""


def write_walking(out: Path, *, with_code: bool = False) -> None:
    """Write an InternVL2 checkpoint that walks; ``with_code`` adds code of its own to it."""
    tokenizer = train_tokenizer([WORDS], WALKING.language.vocab_size)
    write_description(out, WALKING, tokenizer)
    write_weights(out, walking_weights(tokenizer, SEED))
    if with_code:
        add_code(out)


def walking_weights(tokenizer: Tokenizer, seed: int) -> dict[str, Tensor]:
    """The weights of ``WALKING`` by their published names."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _start_value(name, tuple(shape)) for name, shape in shapes_of(WALKING).items()}
    _see(weights, generator)
    language = "language_model.model"
    embeddings = weights[f"{language}.tok_embeddings.weight"]
    _walk(embeddings, weights["language_model.output.weight"], tokenizer, generator)
    attention = f"{language}.layers.0.attention"
    values = weights[f"{attention}.wqkv.weight"].unflatten(
        0, (WALKING.language.num_key_value_heads, -1, WALKING.language.head_size)
    )
    # Queries and keys stay zero: every token of the context counts the same.
    values[:, -1] = _noise(values[:, -1], generator)
    values[:, -1, :, : len(DIGITS)] *= _DIGIT_GAIN
    weights[f"{attention}.wo.weight"] = _ATTENTION * _noise(
        weights[f"{attention}.wo.weight"], generator
    )
    return weights


def write_text_model(out: Path) -> None:
    """Write a Qwen2 checkpoint that walks: a language model without eyes."""
    language = WALKING.language
    tokenizer = train_tokenizer([WORDS], language.vocab_size)
    write_description(out, WALKING, tokenizer)
    hidden, heads, layers = language.hidden_size, language.num_attention_heads, 2
    kv = language.num_key_value_heads * language.head_size
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": language.intermediate_size,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": language.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": language.vocab_size,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(SEED)
    weights = {
        "model.embed_tokens.weight": torch.zeros(language.vocab_size, hidden),
        "lm_head.weight": torch.zeros(language.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = torch.zeros(rows, hidden)
            weights[f"{at}.self_attn.{name}_proj.bias"] = torch.zeros(rows)
        weights[f"{at}.self_attn.o_proj.weight"] = torch.zeros(hidden, hidden)
        for name in ("gate", "up"):
            weights[f"{at}.mlp.{name}_proj.weight"] = torch.zeros(
                language.intermediate_size, hidden
            )
        weights[f"{at}.mlp.down_proj.weight"] = torch.zeros(hidden, language.intermediate_size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = torch.ones(hidden)
    _walk(weights["model.embed_tokens.weight"], weights["lm_head.weight"], tokenizer, generator)
    first = "model.layers.0.self_attn"
    for name, scale in (("v", 1.0), ("o", _ATTENTION)):
        key = f"{first}.{name}_proj.weight"
        weights[key] = scale * _noise(weights[key], generator)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})


def _start_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Ones for what scales, zeros for everything else."""
    *_, owner, kind = name.split(".")
    scales = kind in ("ls1", "ls2") or name == "mlp1.0.weight"
    if scales or (kind == "weight" and "norm" in owner):
        return torch.ones(shape)
    return torch.zeros(shape)


def _see(weights: dict[str, Tensor], generator: torch.Generator) -> None:
    """Let a tile's patches reach the language model, unaltered by the ViT's layers."""
    for name in (
        "vision_model.embeddings.patch_embedding.weight",
        "mlp1.1.weight",
        "mlp1.3.weight",
    ):
        weights[name] = _noise(weights[name], generator)


def _walk(
    embeddings: Tensor, output: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> None:
    """Fill the embeddings, and an output that follows a round through the word tokens."""
    embeddings.normal_(generator=generator)
    # Digits tell prompts apart that are otherwise alike: each has a channel of its own.
    embeddings[:, : len(DIGITS)] = 0
    for channel, digit in enumerate(DIGITS):
        embeddings[_ids(tokenizer, digit), channel] = math.sqrt(embeddings.shape[1])
    # What stands before every answer says nothing, so that the first token is the context's.
    embeddings[_ids(tokenizer, "\n")] = 0
    words = [
        number
        for number in range(tokenizer.get_vocab_size())
        if re.fullmatch(r" ?[a-z]+", tokenizer.decode([number], skip_special_tokens=True))
    ]
    order = torch.randperm(len(words), generator=generator).tolist()
    walk = [words[place] for place in order]
    for number, following in zip(walk, walk[1:] + walk[:1], strict=True):
        output[following] = embeddings[number] / math.sqrt(output.shape[1])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights that keep the size of what they multiply."""
    fan_in = math.prod(like.shape[1:]) if like.dim() != 3 else like.shape[-1]
    return torch.empty_like(like).normal_(std=1 / math.sqrt(fan_in), generator=generator)
