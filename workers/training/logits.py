"""Logits only where there is a label.

A sample of a picture has thousands of tokens and labels for the few of its answer; the others count
for nothing in the loss. xtuner computes the head for all of them, in float32, and throws them away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_IGNORED = -100


def compute_labelled_only(model: nn.Module) -> bool:
    """Make xtuner's wrapper of InternVL compute its loss from labelled tokens alone.

    Returns whether it could: the head has to be one module that is given all hidden states.
    """
    head = model.model.language_model.get_output_embeddings()  # type: ignore[operator, union-attr]
    original: Any = getattr(model, "_llm_forward", None)
    if original is None or not isinstance(head, nn.Module):
        return False
    chooser = _Chooser()
    head.register_forward_pre_hook(chooser)

    def forward(*, labels: Tensor, **given: Any) -> Any:
        chooser.wanted = _before_labels(labels)
        try:
            out = original(labels=None, **given)
        finally:
            wanted, chooser.wanted = chooser.wanted, None
        out.loss = functional.cross_entropy(
            out.logits.float(), labels[:, 1:][wanted[:, :-1]].to(out.logits.device)
        )
        return out

    model._llm_forward = forward  # type: ignore[assignment]  # noqa: SLF001
    return True


class _Chooser:
    """Hands the head those hidden states ``[b, n, hidden]`` that are wanted, ``[wanted, hidden]``."""

    def __init__(self) -> None:
        self.wanted: Tensor | None = None

    def __call__(self, head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.wanted is None else (given[0][self.wanted], *given[1:])


def _before_labels(labels: Tensor) -> Tensor:
    """Where the next token has a label: ``[b, n]`` of booleans, the last of each row False."""
    following = labels[:, 1:] != _IGNORED
    return torch.cat([following, torch.zeros_like(following[:, :1])], dim=1)
