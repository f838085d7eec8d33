"""Runs a program of xtuner's where torch is built without CUDA: ``python -m … PROGRAM ARGUMENTS``.

There is no torchvision build for such a torch; it can be imported once the operators that it would
bring are declared.
"""

from __future__ import annotations

import runpy
import sys

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def main() -> None:
    """Declare what is missing and become the program."""
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
