"""Writes the model that is measured and measures the GPU itself: ``python -m … OUT``.

A program of its own, so that the benchmark holds no GPU memory. Prints one line of JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import torch

from benchmarks.gpu.machine import Machine
from workers.inference.internvl.export import add_code
from workers.inference.internvl.synthesis import INTERNVL2_2B, write_random

_SIDE = 8192
_TIMES = 20


def matmul_tflops() -> float:
    """What the first GPU does in one product of bfloat16 matrices, in 10^12 operations/s."""
    left, right = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    for _ in range(5):
        torch.matmul(left, right)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_TIMES):
        torch.matmul(left, right)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return float(2 * _SIDE**3 * _TIMES / seconds / 1e12)


def main() -> None:
    """Write the model to the folder given."""
    tflops = matmul_tflops()
    out = Path(sys.argv[1])
    began = time.monotonic()
    parameters = write_random(out, INTERNVL2_2B, device="cuda")
    add_code(out)
    machine = Machine(
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        tflops=tflops,
        parameters=parameters,
        model_s=time.monotonic() - began,
        torch_version=str(torch.__version__),
    )
    sys.stdout.write(msgspec.json.encode(machine).decode() + "\n")


if __name__ == "__main__":
    main()
