"""A fine-tune by vlmq beside stock xtuner: ``python -m benchmarks.gpu.finetune --out FILE``.

Trains InternVL2-2B with random weights on photographs of 1024 x 768: ``stock`` is xtuner's own
``train.py`` with the tutorial's settings, ``ours`` the same recipe through this project's trainer.
Prints a table of figures with their targets and writes them, with every loss and time, as JSON
after every row. What is measured and how: docs/benchmarks.md.

``--set [ROW:]KEY=VALUE`` changes ``ours`` or, under another name, adds a row of its own:
``--set b16:recipe.batch_size=16 --set b16:micro=16 --set b16:speed.gradient_checkpointing=true``.
Keys: ``gpus``, ``micro``, ``recipe.*``, ``resolved.*``, ``speed.*`` and ``config.*``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu import stock, tuned
from benchmarks.gpu.clock import BudgetSpent, Clock, Terminated, bounded
from benchmarks.gpu.finetune_results import (
    CACHED,
    CURVE,
    OURS,
    SEVERAL,
    STOCK,
    Conversion,
    Findings,
    Training,
    figures,
)
from benchmarks.gpu.gpu_samples import gpu_names
from benchmarks.gpu.machine import Preparing
from benchmarks.gpu.published import add_published_code
from benchmarks.gpu.stock import Tutorial
from benchmarks.gpu.training_data import Rows, write_rows
from benchmarks.gpu.training_process import (
    Observed,
    last_checkpoint,
    running,
    size_of,
    tail,
    train,
)
from benchmarks.gpu.tuned import Variant
from benchmarks.report import table, write_json
from shared.errors import ConfigurationError, VlmqError

CONVERT = "convert"
ROWS = (STOCK, OURS, CURVE, CACHED, SEVERAL, CONVERT)
_OUT = Path(__file__).parents[1] / "results" / "finetune.json"
_TRAINING_LIMIT_S, _CONVERSION_LIMIT_S = 240.0, 90.0
_LEAST_S = 40.0
"""A training is not begun with less than this left."""
_WARM_UP_SHARE = 0.2


@dataclass
class Session:
    """One run: where things lie, what is asked for, and what was found."""

    folder: Path
    out: Path
    rows: Sequence[str]
    gpus: list[str]
    variants: dict[str, Variant]
    row_count: int
    clock: Clock
    findings: Findings
    about: dict[str, str]
    model: Path = Path()
    data: Rows | None = None
    configs: dict[str, Path] = field(default_factory=dict)
    """Of trainings that went to their end and are converted."""
    works: dict[str, Path] = field(default_factory=dict)
    """Their work folders."""

    @property
    def tutorial(self) -> Tutorial:
        """The settings of this run."""
        return _tutorial(self.row_count)

    @property
    def environment(self) -> dict[str, str]:
        """transformers keeps copies of models' code by the name of their folder alone."""
        return {"HF_MODULES_CACHE": str(self.folder / "modules")}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Do one thing; what goes wrong is noted and the run goes on with the next."""
        self.clock.say(f"{name} ...")
        try:
            yield
        except (AssertionError, TimeoutError, subprocess.SubprocessError) as error:
            self.findings.failed = True
            self.note(f"{name} FAILED: {type(error).__name__}: {error}")
        finally:
            self.save()

    def note(self, text: str) -> None:
        """Say what was left out, now and in the results."""
        self.findings.notes.append(text)
        self.clock.say(text)

    def save(self) -> None:
        """Write what there is so far."""
        measured = msgspec.to_builtins(self.findings)
        write_json(self.out, figures(self.findings), self.about, measured=measured)

    def keep_log(self, log: Path) -> None:
        """Add a log to the one file beside the results."""
        with self.out.with_suffix(".log").open("ab") as all_logs:
            all_logs.write(f"\n===== {log.stem} =====\n".encode() + log.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure within the budget and return the exit status: 1 if a target or a row was missed."""
    args = _parse(arguments)
    clock = Clock(args.budget_s)
    findings = Findings(dry=args.dry)
    session: Session | None = None
    try:
        with bounded(clock), tempfile.TemporaryDirectory(prefix="finetune-") as name:
            session = _open(args, Path(name), clock, findings)
            _measure(session)
    except (BudgetSpent, Terminated) as end:
        findings.failed = True
        findings.notes.append(f"{type(end).__name__} before everything was done")
    except VlmqError as error:
        print(error.message, file=sys.stderr)
        return 2
    return 2 if session is None else _conclude(session)


def _measure(session: Session) -> None:
    _prepare(session)
    if STOCK in session.rows:
        _stock(session)
    for variant in session.variants.values():
        _ours(session, variant)
    if CONVERT in session.rows:
        _convert(session)


def _prepare(session: Session) -> None:
    """Write the model and, meanwhile, rows and pictures."""
    session.clock.say("writing the model and the pictures")
    session.model = session.folder / "model"
    distinct = min(session.row_count, 8 if session.findings.dry else 64)
    if session.findings.dry:
        from workers.inference.internvl.synthesis import TINY, write_random

        write_random(session.model, TINY)
        session.data = write_rows(session.folder, session.row_count, distinct=distinct)
    else:
        preparing = Preparing(session.model)
        try:
            session.data = write_rows(session.folder, session.row_count, distinct=distinct)
            session.findings.tflops = preparing.finish(session.clock.limit(120)).tflops
        finally:
            preparing.close()
    add_published_code(session.model)


def _stock(session: Session) -> None:
    assert session.data is not None
    tutorial, cpu = session.tutorial, session.findings.dry
    iterations = session.row_count // tutorial.batch_size
    config, work = session.folder / "stock.py", session.folder / "stock.work"
    config.write_text(
        stock.configuration(session.model, session.data, tutorial, iterations), encoding="utf-8"
    )
    command = stock.train_command(config, work, cpu=cpu)
    with session.step(STOCK):
        observed = _train(session, STOCK, command, work, stock.environment(), 1)
        session.findings.trainings.append(
            Training(
                STOCK,
                1,
                tutorial.batch_size,
                tutorial.accumulative_counts,
                _warm_up(session, tutorial.batch_size),
                observed,
            )
        )
        session.configs[STOCK], session.works[STOCK] = config, work


def _ours(session: Session, variant: Variant) -> None:
    assert session.data is not None
    ordered = tuned.order(
        variant,
        session.folder,
        session.model,
        session.data,
        session.tutorial,
        cpu=session.findings.dry,
    )
    name, resolved = variant.name, ordered.resolved
    with session.step(name):
        observed = _train(session, name, ordered.command, ordered.work, {}, variant.gpus)
        session.findings.trainings.append(
            Training(
                name,
                variant.gpus,
                resolved.micro_batch_size,
                resolved.accumulation,
                _warm_up(session, resolved.micro_batch_size * variant.gpus),
                observed,
                cached_s=_cached_s(session.folder / f"{name}.log"),
                settings={**_shown(ordered.speed), "data_workers": str(resolved.data_workers)},
            )
        )
        if name == OURS:
            session.configs[name], session.works[name] = ordered.config, ordered.work
    if name not in session.works:
        # Gigabytes each: checkpoints and features.
        for left in (ordered.work, session.folder / f"{name}.features"):
            shutil.rmtree(left, ignore_errors=True)


def _train(
    session: Session,
    name: str,
    command: Sequence[str],
    work: Path,
    environment: dict[str, str],
    gpus: int,
) -> Observed:
    left_s = session.clock.left()
    assert left_s > _LEAST_S, f"only {left_s:.0f} s are left"
    log = session.folder / f"{name}.log"
    try:
        observed = train(
            command,
            work,
            log,
            environment={**environment, **session.environment},
            gpus=session.gpus[:gpus],
            limit_s=session.clock.limit(_TRAINING_LIMIT_S),
        )
    finally:
        if log.exists():
            session.keep_log(log)
    mean_s = sum(one.time for one in observed.iterations[1:]) / max(1, len(observed.iterations) - 1)
    session.clock.say(
        f"{name}: start-up {observed.startup_s:.0f} s, {mean_s:.2f} s per iteration, "
        f"losses {observed.iterations[0].loss:.3f} to {observed.iterations[-1].loss:.3f}"
    )
    return observed


def _cached_s(log: Path) -> float | None:
    """Seconds that the trainer says its cache of features took; None without one."""
    found = re.search(r"Features are cached after ([\d.]+) s", log.read_text(errors="replace"))
    return float(found[1]) if found else None


def _convert(session: Session) -> None:
    if STOCK in session.works:
        out = session.folder / "stock.converted"
        checkpoint = last_checkpoint(session.works[STOCK])
        cpu = session.findings.dry
        command = stock.convert_command(session.configs[STOCK], checkpoint, out, cpu=cpu)
        _converted(session, STOCK, command, out, stock.environment())
    if OURS in session.works:
        checkpoint = last_checkpoint(session.works[OURS])
        command = tuned.convert_command(
            session.folder, session.configs[OURS], checkpoint, session.model
        )
        _converted(session, OURS, command, session.folder / "tuned", {})


def _converted(
    session: Session, name: str, command: Sequence[str], out: Path, environment: dict[str, str]
) -> None:
    log = session.folder / f"{name}.convert.log"
    with session.step(f"{name}: conversion"):
        began = time.monotonic()
        variables = {**environment, **session.environment}
        with running(command, log, variables, session.gpus[:1]) as process:
            process.wait(session.clock.limit(_CONVERSION_LIMIT_S))
        session.keep_log(log)
        assert process.returncode == 0, f"exit status {process.returncode}: {tail(log)}"
        seconds = time.monotonic() - began
        session.findings.conversions.append(Conversion(name, seconds, size_of(out)))


def _warm_up(session: Session, samples_per_iteration: int) -> int:
    """Iterations over the first fifth of the rows."""
    return ceil(session.row_count * _WARM_UP_SHARE / samples_per_iteration)


def _conclude(session: Session) -> int:
    session.save()
    found = figures(session.findings)
    print(table(found))
    print("\n" + ", ".join(f"{key} {value}" for key, value in session.about.items()))
    for training in session.findings.trainings:
        chosen = ", ".join(f"{key} {value}" for key, value in training.settings.items())
        print(f"{training.name}: {chosen or 'as shipped, edited as in the tutorial'}")
    for note in session.findings.notes:
        print(f"note: {note}")
    if session.findings.dry:
        print("DRY RUN of a tiny model on the processor: the speeds say nothing of a GPU")
    return int(session.findings.failed or any(figure.passed is False for figure in found))


# --- what is asked for ---------------------------------------------------------------------------


def _open(args: argparse.Namespace, folder: Path, clock: Clock, findings: Findings) -> Session:
    names = [] if args.dry else gpu_names()
    if not args.dry and not names:
        raise ConfigurationError(
            "no NVIDIA GPU is visible (nvidia-smi lists none); --dry trains a tiny model here"
        )
    gpus = args.gpus.split(",") if args.gpus else [str(number) for number in range(len(names))]
    row_count = args.rows or (32 if args.dry else 160)
    if row_count % 16 or row_count < 16:
        raise ConfigurationError(
            f"--rows {row_count}: write a multiple of 16, so that all batches are full"
        )
    rows = args.only or [*ROWS, *_named(args.set)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".log").unlink(missing_ok=True)
    return Session(
        folder=folder,
        out=args.out,
        rows=rows,
        gpus=gpus,
        variants=_variants(rows, args.set, len(gpus), row_count),
        row_count=row_count,
        clock=clock,
        findings=findings,
        about={
            "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "gpus": ", ".join(names) or "none: dry run",
            "cores": str(os.cpu_count()),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "xtuner", "deepspeed", "transformers")},
            "set": " ".join(args.set) or "defaults",
        },
    )


def _tutorial(rows: int) -> Tutorial:
    """With a warm-up of at least two iterations, fewer being none."""
    iterations = rows // Tutorial().batch_size
    return Tutorial(warmup_ratio=max(Tutorial().warmup_ratio, 2.5 / iterations))


def _variants(
    rows: Sequence[str], changes: Sequence[str], gpus: int, row_count: int
) -> dict[str, Variant]:
    """The rows of ours that are asked for, in the order in which they are measured.

    Raises: ConfigurationError.
    """
    tutorial = _tutorial(row_count)
    known = {
        OURS: Variant(OURS),
        CURVE: tuned.like_stock(tutorial, row_count // tutorial.batch_size),
        CACHED: Variant(CACHED, speed={"cached_features": True}),
        SEVERAL: Variant(SEVERAL, gpus=gpus),
    }
    for change in changes:
        row, key, value = _change(change)
        known[row] = known.get(row, Variant(row)).changed(key, value)
    chosen = {name: variant for name, variant in known.items() if name in rows}
    if SEVERAL in chosen and chosen[SEVERAL].gpus < 2:
        del chosen[SEVERAL]
    return chosen


def _change(text: str) -> tuple[str, str, Any]:
    """``[ROW:]KEY=VALUE``; the value is JSON, or else a word."""
    key, equals, value = text.partition("=")
    row, _, key = key.rpartition(":")
    if not equals or not key:
        raise ConfigurationError(f"--set {text}: write [ROW:]KEY=VALUE")
    with suppress(ValueError):
        return row or OURS, key, json.loads(value)
    return row or OURS, key, value


def _named(changes: Sequence[str]) -> list[str]:
    """Rows that only ``--set`` names."""
    names = [_change(change)[0] for change in changes]
    return [name for name in dict.fromkeys(names) if name not in ROWS]


def _shown(speed: msgspec.Struct) -> dict[str, str]:
    return {
        key: "yes" if key == "cached_features" and value else str(value)
        for key, value in msgspec.structs.asdict(speed).items()
    }


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=_OUT, help="default: %(default)s")
    add("--budget-s", type=float, default=500.0, help="ends by then, whatever it takes")
    add("--gpus", help="such as 0,1 (default: all)")
    add("--only", nargs="+", action="extend", metavar="ROW", help=f"{', '.join(ROWS)}, own rows")
    add("--rows", type=int, help="rows of the data set (default: 160)")
    add("--set", action="append", default=[], metavar="[ROW:]KEY=VALUE")
    add("--dry", action="store_true", help="a tiny model on the processor: tries the program")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
