"""vlmq beside raw lmdeploy on GPUs, in one command: ``python -m benchmarks.gpu.run``.

Prints a table of figures with their targets and writes them, with everything they were made of, as
JSON after every row. The exit status is 1 if a target was missed or a row could not be measured.
What is measured and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu import ours, theirs
from benchmarks.gpu.opening import BACKENDS, add_common, conducted, prepare
from benchmarks.gpu.scale import DRY, FULL, QUICK, GpuScale
from benchmarks.gpu.session import Session
from benchmarks.gpu.work import WORKS

ROWS = (*WORKS, "chat", "chat-busy", "gpus")
_BACKEND_S = 260.0
"""What a backend that is still to come needs at least; a second round of raw gives way to it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and return the exit status."""
    args = _parse(arguments)

    def measure(session: Session) -> None:
        session.rows = args.only or list(ROWS)
        prepare(session)
        _measure(session, args.raw_rounds)

    return conducted(args, _scale(args), measure)


def _measure(session: Session, raw_rounds: int) -> None:
    """Each backend: raw, ours, raw again if the time allows."""
    for number, backend in enumerate(session.backends):
        if not session.results.dry and raw_rounds:
            theirs.measure(session, backend)
        else:
            session.note(f"{backend}: raw lmdeploy was not measured")
        ours.measure(session, backend)
        if raw_rounds > 1 and not session.results.dry:
            still_to_come = len(session.backends) - number - 1
            needed_s = theirs.took_s(session, backend) * 1.2 + _BACKEND_S * still_to_come
            if session.clock.left() < needed_s:
                session.note(f"{backend}: no time to measure raw lmdeploy again")
            else:
                theirs.measure(session, backend)
        if "gpus" in session.rows:
            ours.measure_all_gpus(session, backend)


def _scale(args: argparse.Namespace) -> GpuScale:
    if args.engine == "echo":
        return DRY
    return QUICK if args.quick else FULL


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.run", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", action="extend", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    add("--quick", action="store_true", help="about a third of the items")
    add("--raw-rounds", type=int, choices=(0, 1, 2), default=2, help="raw before, and after ours")
    add_common(parser, backends=",".join(BACKENDS), out="gpu.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
