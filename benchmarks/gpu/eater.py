"""Takes a GPU's memory but for a rest, says so in one line, and holds it until its input ends."""

from __future__ import annotations

import sys

import torch

LEFT_BYTES = 3 * 1024**3
"""Less than the weights of InternVL2-2B in bfloat16."""


def main() -> None:
    """Take it and wait."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(1, free - LEFT_BYTES), dtype=torch.uint8, device="cuda")
    sys.stdout.write(f"{held.numel()}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
