"""What a base model's folder says about training it. No weights are read, no model library needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.checkpoints import read_header, weight_files
from shared.errors import InvalidRequest
from shared.storage import read_json

Language = Literal["internlm2", "phi3"]

_LANGUAGES: dict[str, Language] = {"InternLM2ForCausalLM": "internlm2", "Phi3ForCausalLM": "phi3"}
LLM_TARGETS: dict[Language, tuple[str, ...]] = {
    "internlm2": ("wqkv", "wo", "w1", "w2", "w3"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
VIT_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Tower(msgspec.Struct, frozen=True):
    """The language model or the ViT. ``shapes`` are ``[out, in]`` of the layers LoRA may go on."""

    layers: int
    hidden: int
    intermediate: int
    parameters: int
    shapes: dict[str, list[tuple[int, int]]]


class BaseFacts(msgspec.Struct, frozen=True):
    """Sizes of a base model. Tokens are those of the language model."""

    language: Language
    llm: Tower
    vit: Tower
    projector_parameters: int
    vocabulary: int
    tokens_per_tile: int
    max_tiles: int
    """Most tiles of an image, thumbnail included."""
    context: int
    has_code: bool
    weights_bytes: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.llm.parameters + self.vit.parameters + self.projector_parameters

    @property
    def patches_per_tile(self) -> int:
        """Tokens of the ViT per tile, about: the projector folds four into one."""
        return 4 * self.tokens_per_tile


def read_base_facts(folder: Path) -> BaseFacts:
    """Read a base model's folder.

    Raises: InvalidRequest (param ``model``) for a model that xtuner cannot tune, CheckpointInvalid
    for weights that are not whole, StorageFailed.
    """
    raw = read_json(folder / "config.json")
    if not isinstance(raw, Mapping):
        raise _refusal(f"{folder} has no config.json")
    llm, vit = _part(raw, "llm_config"), _part(raw, "vision_config")
    language = _language(llm)
    shapes = _shapes(folder)
    side = int(raw.get("force_image_size") or vit["image_size"]) // int(vit["patch_size"])
    tiles = int(raw.get("max_dynamic_patch") or 1)
    return BaseFacts(
        language=language,
        llm=_tower(llm, shapes, "language_model.", LLM_TARGETS[language]),
        vit=_tower(vit, shapes, "vision_model.", VIT_TARGETS),
        projector_parameters=_count(shapes, "mlp1."),
        vocabulary=int(llm["vocab_size"]),
        tokens_per_tile=int(side**2 * float(raw.get("downsample_ratio", 0.5)) ** 2),
        max_tiles=tiles + (1 if raw.get("use_thumbnail") and tiles > 1 else 0),
        context=int(llm.get("max_position_embeddings") or 2048),
        has_code=bool(raw.get("auto_map")),
        weights_bytes=sum(file.stat().st_size for file in weight_files(folder, pickles=True)),
    )


def _language(llm: Mapping[str, Any]) -> Language:
    kinds = llm.get("architectures") or ["none"]
    language = _LANGUAGES.get(str(kinds[0]))
    if language is None:
        raise _refusal(
            f"its language model is {kinds[0]}; xtuner tunes InternVL2 models with InternLM2 or Phi-3"
            " (2B, 4B, 8B and 26B)"
        )
    return language


def _part(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = raw.get(key)
    if raw.get("model_type") != "internvl_chat" or not isinstance(part, Mapping):
        raise _refusal(f"it is a {raw.get('model_type')}, not an InternVL2 model")
    return part


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"this model cannot be fine-tuned: {why}; choose another", param="model")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: place.shape
        for file in weight_files(folder)
        for name, place in read_header(file).items()
    }


def _tower(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    targets: tuple[str, ...],
) -> Tower:
    return Tower(
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        intermediate=int(config["intermediate_size"]),
        parameters=_count(shapes, prefix),
        shapes={
            target: [
                (shape[0], shape[1])
                for name, shape in shapes.items()
                if name.startswith(prefix) and name.endswith(f".{target}.weight")
            ]
            for target in targets
        },
    )


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
