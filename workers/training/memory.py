"""How many samples fit into a GPU's memory. Estimates, fitted to runs of InternVL2-2B.

Measured on one GPU with LoRA at 3,410 tokens a sample: 64 GiB at 4 samples and 119 GiB at 8 without
gradient checkpointing, 24.7 GiB at 4 with it. The formulas below give 64, 118 and 25.
"""

from __future__ import annotations

from shared.finetunes import Recipe
from workers.training.base_facts import BaseFacts, Tower

_SHARE = 0.85  # of the memory; the rest is for fragments, buckets and a longer row than expected
_HIDDENS, _INTERMEDIATES = 17, 4  # tensors that a layer keeps per token, in bfloat16
_LOGITS_BYTES = 12  # three copies in float32
_RUNTIME_BYTES = 2 << 30


def most_samples(
    recipe: Recipe,
    base: BaseFacts,
    memory_bytes: int,
    gpus: int,
    trained: int,
    tokens: int,
    *,
    checkpointing: bool,
) -> int:
    """The most samples per GPU and iteration, 0 if not even one fits."""
    free = memory_bytes * _SHARE - fixed_bytes(recipe, base, max(1, gpus), trained)
    return max(0, int(free // sample_bytes(recipe, base, tokens, checkpointing=checkpointing)))


def fits(samples: int) -> bool:
    """Whether training is possible at all."""
    return samples > 0


def fixed_bytes(recipe: Recipe, base: BaseFacts, gpus: int, trained: int) -> int:
    """Weights, gradients and the optimizer's state on one GPU."""
    weights = base.parameters * 2
    if recipe.method == "qlora":
        weights -= int(base.llm.parameters * 1.4) if "llm" in recipe.lora_targets else 0
    if recipe.deepspeed.startswith("zero3"):
        weights //= gpus
    state = 0 if recipe.deepspeed.endswith("offload") else trained * 12 // gpus
    return weights + trained * 2 + state + _RUNTIME_BYTES


def sample_bytes(recipe: Recipe, base: BaseFacts, tokens: int, *, checkpointing: bool) -> int:
    """Activations that one sample of ``tokens`` tokens keeps for the way back."""
    kept = tokens * (_kept(base.llm, checkpointing=checkpointing) + base.vocabulary * _LOGITS_BYTES)
    if "vit" in recipe.lora_targets:
        patches = base.patches_per_tile * max(1, tokens // base.tokens_per_tile)
        kept += patches * _kept(base.vit, checkpointing=checkpointing)
    return kept


def _kept(tower: Tower, *, checkpointing: bool) -> int:
    """Bytes per token: of all layers, or of their inputs and one layer."""
    layer = 2 * (_HIDDENS * tower.hidden + _INTERMEDIATES * tower.intermediate)
    return 2 * tower.hidden * tower.layers + layer if checkpointing else layer * tower.layers
