"""Makes torchvision importable beside a CPU build of torch, for which no build of it exists.

transformers imports torchvision wherever it is installed, and that import wants to describe two
operators that only its compiled part defines. Nothing here or in InternVL's code calls them, so
their signatures are enough.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a library's definitions go away with it


def provide_vision_ops() -> None:
    """Define the operators, once, if torch is a CPU build and torchvision not yet imported."""
    if torch.version.cuda is not None or _libraries or "torchvision" in sys.modules:
        return
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _libraries.append(library)
