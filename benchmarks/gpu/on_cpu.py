"""Runs a program of xtuner's where there is no GPU: ``python -m … PROGRAM ARGUMENTS``."""

from __future__ import annotations

import runpy
import sys

from workers.training import surroundings


def main() -> None:
    """Make its imports work beside a CPU build of torch and become the program."""
    surroundings.prepare_imports()
    import deepspeed  # noqa: F401 - before mmengine, which swallows what this raises

    surroundings.skip_compiling()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
