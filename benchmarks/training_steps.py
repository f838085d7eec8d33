"""A program that trains: ``python -m benchmarks.training_steps SECONDS``.

Prints how long a step took, in milliseconds. The model is a transformer with 1.4 million parameters, as small as
what fits a processor, and torch uses as many threads as it likes.
"""

from __future__ import annotations

import sys
import time

import torch

_WARM_UP = 5


def main() -> None:
    """Train for a while."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(192, 4, 512, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.randn(8, 64, 192)

    def step() -> None:
        optimizer.zero_grad()
        model(data).pow(2).mean().backward()
        optimizer.step()

    for _ in range(_WARM_UP):
        step()
    begun, count, limit_s = time.perf_counter(), 0, float(sys.argv[1])
    while time.perf_counter() - begun < limit_s:
        step()
        count += 1
    sys.stdout.write(f"{(time.perf_counter() - begun) / count * 1000}")


if __name__ == "__main__":
    main()
