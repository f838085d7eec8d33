"""Every benchmark, in one command: ``python -m benchmarks.run [--only NAME] [--quick | --full]``.

Prints a table of figures with their targets and writes ``benchmarks/results/latest.json``. The
exit status is 1 if a target was missed. What is measured and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks import batch, beside, chat, image_sets, listing, memory, streams
from benchmarks.report import Figure, table, write_json
from benchmarks.scale import FULL, QUICK, Scale

BENCHMARKS: dict[str, Callable[[Scale], list[Figure]]] = {
    "batch": batch.measure,
    "chat": chat.measure,
    "streams": streams.measure,
    "memory": memory.measure,
    "image-sets": image_sets.measure,
    "listing": listing.measure,
    "beside": beside.measure,
}
RESULTS = Path(__file__).parent / "results" / "latest.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and return the exit status."""
    args = _parse(arguments)
    # So that every node and worker is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scale = QUICK if args.quick else FULL if args.full else Scale()
    if args.items:
        scale = msgspec.structs.replace(
            scale, items=args.items, images=args.items, entries=args.items
        )
    about = {**_about(), "scale": "quick" if args.quick else "full" if args.full else "usual"}
    figures: list[Figure] = []
    for name in args.only or BENCHMARKS:
        figures += _measured(name, scale)
    about["load_after"] = _load()
    write_json(RESULTS, figures, about)
    print(table(figures))
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    if args.quick:
        print("quick: too small a run for its figures to mean much")
    return int(any(figure.passed is False for figure in figures))


def _measured(name: str, scale: Scale) -> list[Figure]:
    print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
    start = time.monotonic()
    figures = BENCHMARKS[name](scale)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return figures


def _about() -> dict[str, str]:
    return {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "load_before": _load(),
    }


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be repeated")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smoke test of two minutes")
    size.add_argument("--full", action="store_true", help="a million images, ten million entries")
    parser.add_argument(
        "--items", type=int, help="items of batch, images of image-sets, entries of listing"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
