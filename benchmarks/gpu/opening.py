"""How a run begins: what was asked for is checked, the model and the pictures are made."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.gpu.clock import BudgetSpent, Clock, Terminated, bounded
from benchmarks.gpu.gpu_samples import gpu_names
from benchmarks.gpu.machine import Preparing
from benchmarks.gpu.photos import write_photos
from benchmarks.gpu.results import Results
from benchmarks.gpu.scale import GpuScale
from benchmarks.gpu.session import Session
from benchmarks.gpu.setups import SETUPS, setup_of
from benchmarks.gpu.work import WORKS
from shared.errors import ConfigurationError, VlmqError
from workers.inference.internvl.config import read_config

BACKENDS = tuple(name for name in SETUPS if name != "echo")
_RESULTS = Path(__file__).parents[1] / "results"
_BUDGET_S = 570.0


def add_common(parser: argparse.ArgumentParser, *, backends: str, out: str) -> None:
    """The arguments that every program here has."""
    add = parser.add_argument
    add("--backends", default=backends, help="default: %(default)s")
    add("--gpus", help="such as 0,1 (default: all)")
    add("--set", action="append", default=[], metavar="[BACKEND:]SECTION.KEY=VALUE")
    add("--size", action="append", default=[], metavar="ROW.FIELD=N")
    add("--engine", choices=("lmdeploy", "echo"), default="lmdeploy", help="echo: a dry run")
    add("--budget-s", type=float, default=_BUDGET_S, help="ends by then, whatever it takes")
    add("--out", type=Path, default=_RESULTS / out, help="default: %(default)s")


def open_session(
    args: argparse.Namespace, folder: Path, scale: GpuScale, results: Results, clock: Clock
) -> Session:
    """Check what was asked for. Raises: ConfigurationError before anything is started."""
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
        rows=[],
        backends=backends,
        gpus=gpus,
        changes=args.set,
        scale=scale.with_sizes(args.size),
        clock=clock,
        results=results,
        about=about,
        out=args.out,
    )


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def conducted(args: argparse.Namespace, scale: GpuScale, measure: Callable[[Session], None]) -> int:
    """Open a session, measure within the budget, and give the exit status of what was found."""
    results = Results(dry=args.engine == "echo")
    clock = Clock(args.budget_s)
    session: Session | None = None
    try:
        with bounded(clock), tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            session = open_session(args, Path(name), scale, results, clock)
            measure(session)
    except BudgetSpent:
        results.incomplete("the time was up before everything was done")
    except Terminated:
        results.incomplete("ended from outside before everything was done")
    except VlmqError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 2 if session is None else session.conclude()


def prepare(session: Session) -> None:
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
