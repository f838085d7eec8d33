"""Makes torchvision importable beside a CPU build of torch, for code that a checkpoint brings.

PyPI has torchvision for CUDA builds only. Importing it registers kernels for operators that its
own library, which cannot be loaded without CUDA, would have declared; declared here they are enough
for everything that does not call them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_DECLARED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a library's declarations go away with it


def provide_vision_ops() -> None:
    """Do so unless torchvision is there already, or torch is a build for CUDA."""
    if torch.version.cuda is not None or "torchvision" in sys.modules or _libraries:
        return
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _DECLARED:
        library.define(schema)  # type: ignore[no-untyped-call]
    _libraries.append(library)
