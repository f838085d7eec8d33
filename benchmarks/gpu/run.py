"""vlmq beside raw lmdeploy on GPUs, in one command: ``python -m benchmarks.gpu.run``.

Prints a table of figures with their targets and writes them, with everything they were made of, as
JSON after every row. The exit status is 1 if a target was missed or a row could not be measured.
What is measured and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.gpu import ours, theirs
from benchmarks.gpu.clock import BudgetSpent, Clock, Terminated, bounded
from benchmarks.gpu.machine import Preparing
from benchmarks.gpu.photos import write_photos
from benchmarks.gpu.results import Results
from benchmarks.gpu.scale import DRY, FULL, QUICK, GpuScale
from benchmarks.gpu.session import Session
from benchmarks.gpu.setups import SETUPS, setup_of
from benchmarks.gpu.watch import gpu_names
from benchmarks.gpu.work import WORKS
from benchmarks.report import table
from shared.errors import ConfigurationError, VlmqError
from workers.inference.internvl.config import read_config

RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
ROWS = (*WORKS, "chat", "chat-busy", "gpus")
BACKENDS = tuple(name for name in SETUPS if name != "echo")
_BUDGET_S = 570.0
_BACKEND_S = 200.0
"""What a backend that is still to come needs at least; a second round of raw gives way to it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for and return the exit status."""
    args = _parse(arguments)
    results = Results(dry=args.engine == "echo")
    clock = Clock(args.budget_s)
    session: Session | None = None
    try:
        with bounded(clock), tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            session = _session(args, Path(name), results, clock)
            _prepare(session)
            _measure(session, args.raw_rounds)
    except BudgetSpent:
        results.notes.append("the time was up before everything was measured")
    except Terminated:
        results.notes.append("ended from outside before everything was measured")
    except VlmqError as error:
        print(error.message, file=sys.stderr)
        return 2
    assert session is not None
    session.save()
    return _tell(session)


def _session(args: argparse.Namespace, folder: Path, results: Results, clock: Clock) -> Session:
    names = [] if results.dry else gpu_names()
    if not results.dry and not names:
        raise ConfigurationError(
            "no NVIDIA GPU is visible (nvidia-smi lists none); --engine echo makes a dry run"
        )
    gpus = args.gpus.split(",") if args.gpus else [str(number) for number in range(len(names))]
    backends = ["echo"] if results.dry else args.backends.split(",")
    for backend in backends:
        if backend not in SETUPS:
            raise ConfigurationError(f"--backends: choose from {', '.join(BACKENDS)}")
        setup_of(backend, gpus, args.set)  # a wrong --set is said before anything is started
    about = {
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "gpus": ", ".join(names) or "none: dry run with the echo engine",
        "lmdeploy": _version("lmdeploy"),
        "torch": _version("torch"),
        "set": " ".join(args.set) or "defaults",
    }
    return Session(
        folder=folder,
        rows=args.only or list(ROWS),
        backends=backends,
        gpus=gpus,
        changes=args.set,
        scale=_scale(args).with_sizes(args.size),
        clock=clock,
        results=results,
        about=about,
        out=args.out,
    )


def _scale(args: argparse.Namespace) -> GpuScale:
    if args.engine == "echo":
        return DRY
    return QUICK if args.quick else FULL


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def _prepare(session: Session) -> None:
    """Write the model and the pictures, side by side."""
    session.clock.say("drawing pictures" + ("" if session.results.dry else ", writing the model"))
    with _model(session):
        for row in session.works():
            sizes, kind = session.scale.rows[row], WORKS[row].kind
            if kind.name not in session.photos:
                count = max(sizes.ours, sizes.raw, sizes.warm_up)
                session.photos[kind.name] = write_photos(
                    session.photo_folder, kind, count, distinct=sizes.distinct
                )
                first = session.photos[kind.name][0].stat().st_size
                session.clock.say(f"{kind.name}: {count} pictures of about {first / 1e3:,.0f} kB")
    session.save()


@contextmanager
def _model(session: Session) -> Iterator[None]:
    """Write the model while the block runs."""
    if session.results.dry:
        yield
        return
    folder = session.folder / "model"
    preparing = Preparing(folder)
    try:
        yield
        machine = preparing.finish(session.clock.limit(180))
    finally:
        preparing.close()
    session.checkpoint, session.model = folder, read_config(folder)
    session.results.tflops = machine.tflops
    session.clock.say(
        f"{machine.parameters:,} parameters written in {machine.model_s:.0f} s; "
        f"{machine.gpus[0]}: {machine.tflops:.0f} TFLOP/s"
    )


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


def _tell(session: Session) -> int:
    found = session.figures()
    print(table(found))
    print("\n" + ", ".join(f"{key} {value}" for key, value in session.about.items()))
    for note in session.results.notes:
        print(f"note: {note}")
    if session.results.dry:
        print(
            "DRY RUN with the echo engine: no model, no GPU; the figures say nothing about either"
        )
    missed = any(figure.passed is False for figure in found)
    return int(missed or session.failed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.run", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", action="extend", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    add("--quick", action="store_true", help="about a third of the items")
    add("--backends", default=",".join(BACKENDS), help="default: %(default)s")
    add("--gpus", help="such as 0,1; the first carries all rows but `gpus` (default: all)")
    add("--raw-rounds", type=int, choices=(0, 1, 2), default=2, help="raw before, and after ours")
    add("--set", action="append", default=[], metavar="[BACKEND:]SECTION.KEY=VALUE")
    add("--size", action="append", default=[], metavar="ROW.FIELD=N")
    add("--engine", choices=("lmdeploy", "echo"), default="lmdeploy", help="echo: a dry run")
    add("--budget-s", type=float, default=_BUDGET_S, help="ends by then, whatever it takes")
    add("--out", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
