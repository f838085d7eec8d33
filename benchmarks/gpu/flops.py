"""How many floating-point operations InternVL2 needs for one picture, from its shapes alone.

Only matrix products are counted, two operations per multiply-add, each done once: what a perfect
program would have to do. For one picture of ``n`` tiles and an answer of ``t`` tokens

    n * (vision(1025 tokens) + projector(256 tokens))      every tile through the ViT
    + prefill(p)                                           p prompt tokens, causal attention
    + sum of decode(p + i), i = 1 .. t - 1                 one step per further token

where a ViT layer is ``8 T d^2 + 4 T^2 d + 4 T d m`` (T tokens, width d, MLP m), and a language
layer is ``2 T (2 h^2 + 2 h k) + 6 T h m`` plus ``4 h`` for each pair of a token and one it attends
to (width h, keys and values k). The vocabulary is projected to once per new token. The first token
comes out of the prefill.
"""

from __future__ import annotations

from workers.inference.internvl.config import LanguageConfig, ModelConfig


def tile_flops(config: ModelConfig) -> int:
    """One tile through the vision model and the projector."""
    vision, width = config.vision, config.vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1
    embedding = 2 * patches * (3 * vision.patch_size**2) * width
    layer = (
        8 * tokens * width**2
        + 4 * tokens**2 * width
        + 4 * tokens * width * vision.intermediate_size
    )
    hidden = config.language.hidden_size
    joined = round(width / config.downsample_ratio**2)
    image_tokens = round(patches * config.downsample_ratio**2)
    projector = 2 * image_tokens * (joined * hidden + hidden * hidden)
    return embedding + vision.num_hidden_layers * layer + projector


def prefill_flops(config: LanguageConfig, tokens: int) -> int:
    """A prompt of ``tokens`` through the language model, with the first new token's logits."""
    pairs = tokens * (tokens + 1) // 2
    return _layers(config, tokens, pairs) + _head(config)


def decode_flops(config: LanguageConfig, context: int) -> int:
    """One further token that attends to ``context`` tokens, itself included."""
    return _layers(config, 1, context) + _head(config)


def item_flops(config: ModelConfig, *, tiles: int, prompt_tokens: int, new_tokens: int) -> int:
    """One picture and its answer."""
    language = config.language
    return (
        tiles * tile_flops(config)
        + prefill_flops(language, prompt_tokens)
        + sum(decode_flops(language, prompt_tokens + step) for step in range(1, new_tokens))
    )


def _layers(config: LanguageConfig, tokens: int, pairs: int) -> int:
    hidden = config.hidden_size
    kept = config.num_key_value_heads * config.head_size
    layer = (
        2 * tokens * (2 * hidden**2 + 2 * hidden * kept)
        + 6 * tokens * hidden * config.intermediate_size
        + 4 * pairs * hidden
    )
    return config.num_hidden_layers * layer


def _head(config: LanguageConfig) -> int:
    return 2 * config.hidden_size * config.vocab_size
