"""What a checkpoint's ``config.json`` says, under its published keys. Needs no torch.

This file and ``model`` are also copied into checkpoints that carry their own code
(``export``), so both import nothing of this project but each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = "InternVLChatModel"
LANGUAGE_ARCHITECTURE = "InternLM2ForCausalLM"


class ConfigInvalid(ValueError):
    """The config does not describe a model this implementation can build."""


@dataclass(frozen=True)
class VisionConfig:
    """InternViT. Sizes are in channels, except ``image_size`` and ``patch_size`` (pixels)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    qkv_bias: bool = True
    qk_normalization: bool = False
    norm_type: str = "layer_norm"
    layer_norm_eps: float = 1e-6

    @property
    def patches(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LanguageConfig:
    """InternLM2."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    bias: bool = False
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    max_position_embeddings: int = 32768

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. ``select_layer`` is the ViT layer whose output the projector reads."""

    vision: VisionConfig
    language: LanguageConfig
    downsample_ratio: float = 0.5
    dynamic_image_size: bool = True
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    use_thumbnail: bool = True
    ps_version: str = "v2"
    select_layer: int = -1
    template: str = "internlm2-chat"

    @property
    def tokens_per_tile(self) -> int:
        """How many tokens one tile becomes."""
        return int(self.vision.patches**2 * self.downsample_ratio**2)

    @property
    def tile_px(self) -> int:
        """The side of a tile in pixels."""
        return self.vision.image_size


def read_config(folder: Path) -> ModelConfig:
    """Read ``folder/config.json``.

    Raises: FileNotFoundError, or ConfigInvalid when it is no InternVL2 config.
    """
    text = (folder / "config.json").read_text(encoding="utf-8")
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigInvalid(f"config.json is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigInvalid("config.json must hold an object")
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Understand the published keys. Raises: ConfigInvalid."""
    if ARCHITECTURE not in (raw.get("architectures") or []):
        raise ConfigInvalid(
            f"architectures is {raw.get('architectures')}; only {ARCHITECTURE} is known here"
        )
    config = ModelConfig(
        vision=vision_part(_part(raw, "vision_config")),
        language=language_part(_part(raw, "llm_config")),
        downsample_ratio=float(raw.get("downsample_ratio", 0.5)),
        dynamic_image_size=bool(raw.get("dynamic_image_size", False)),
        min_dynamic_patch=int(raw.get("min_dynamic_patch", 1)),
        max_dynamic_patch=int(raw.get("max_dynamic_patch", 6)),
        use_thumbnail=bool(raw.get("use_thumbnail", False)),
        ps_version=str(raw.get("ps_version", "v1")),
        select_layer=int(raw.get("select_layer", -1)),
        template=str(raw.get("template", "internlm2-chat")),
    )
    forced = raw.get("force_image_size") or config.tile_px
    if forced != config.tile_px:
        raise ConfigInvalid(
            f"force_image_size {forced} differs from the ViT's image_size {config.tile_px}"
        )
    return config


def to_json(config: ModelConfig, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The published form of a config; ``tokens`` has the ids ``bos``, ``eos`` and ``pad``."""
    vision, language = config.vision, config.language
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": config.dynamic_image_size,
        "force_image_size": config.tile_px,
        "llm_config": {
            "architectures": [LANGUAGE_ARCHITECTURE],
            "model_type": "internlm2",
            "attn_implementation": "eager",
            "bias": language.bias,
            "bos_token_id": tokens["bos"],
            "eos_token_id": tokens["eos"],
            "pad_token_id": tokens["pad"],
            "hidden_act": "silu",
            "hidden_size": language.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": language.intermediate_size,
            "max_position_embeddings": language.max_position_embeddings,
            "num_attention_heads": language.num_attention_heads,
            "num_hidden_layers": language.num_hidden_layers,
            "num_key_value_heads": language.num_key_value_heads,
            "rms_norm_eps": language.rms_norm_eps,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_theta": language.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": language.vocab_size,
        },
        "max_dynamic_patch": config.max_dynamic_patch,
        "min_dynamic_patch": config.min_dynamic_patch,
        "pad2square": False,
        "ps_version": config.ps_version,
        "select_layer": config.select_layer,
        "template": config.template,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": config.use_thumbnail,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": vision.qk_normalization,
            "qkv_bias": vision.qkv_bias,
            "torch_dtype": "bfloat16",
            "use_flash_attn": False,
        },
    }


def _part(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = raw.get(key)
    if not isinstance(part, Mapping):
        raise ConfigInvalid(f"config.json has no {key}")
    return part


def _whole(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigInvalid(f"{key} must be a positive whole number, not {value!r}")
    return value


def vision_part(raw: Mapping[str, Any]) -> VisionConfig:
    """Understand ``vision_config``. Raises: ConfigInvalid."""
    if raw.get("hidden_act", "gelu") != "gelu":
        raise ConfigInvalid(f"the ViT's hidden_act {raw['hidden_act']!r} is not known here")
    if raw.get("norm_type", "rms_norm") not in ("layer_norm", "rms_norm"):
        raise ConfigInvalid(f"the ViT's norm_type {raw['norm_type']!r} is not known here")
    return VisionConfig(
        hidden_size=_whole(raw, "hidden_size"),
        num_hidden_layers=_whole(raw, "num_hidden_layers"),
        num_attention_heads=_whole(raw, "num_attention_heads"),
        intermediate_size=_whole(raw, "intermediate_size"),
        image_size=_whole(raw, "image_size"),
        patch_size=_whole(raw, "patch_size"),
        qkv_bias=bool(raw.get("qkv_bias", False)),
        qk_normalization=bool(raw.get("qk_normalization", True)),
        norm_type=str(raw.get("norm_type", "rms_norm")),
        layer_norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
    )


def language_part(raw: Mapping[str, Any]) -> LanguageConfig:
    """Understand ``llm_config``. Raises: ConfigInvalid."""
    if LANGUAGE_ARCHITECTURE not in (raw.get("architectures") or []):
        raise ConfigInvalid(
            f"the language model is {' '.join(map(str, raw.get('architectures') or ['none']))}; "
            f"only {LANGUAGE_ARCHITECTURE} is known here"
        )
    if raw.get("tie_word_embeddings"):
        raise ConfigInvalid("tied word embeddings are not known here")
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("type", "dynamic")
    if kind not in ("dynamic", "linear"):
        raise ConfigInvalid(f"the rope_scaling {kind!r} is not known here")
    heads = _whole(raw, "num_attention_heads")
    return LanguageConfig(
        vocab_size=_whole(raw, "vocab_size"),
        hidden_size=_whole(raw, "hidden_size"),
        num_hidden_layers=_whole(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        intermediate_size=_whole(raw, "intermediate_size"),
        bias=bool(raw.get("bias", True)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(raw.get("rope_theta", 10000)),
        # "dynamic" only acts beyond max_position_embeddings, where sessions are not let.
        rope_scaling_factor=float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0,
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
    )
