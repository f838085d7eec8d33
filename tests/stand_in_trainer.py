"""A training interpreter for tests: trains at once and learns nothing, but behaves as the real one.

``finetune.python`` is set to a script that runs this with the real interpreter. The trainer's and the
converter's orders are obeyed with the files and exit statuses that their consumer relies on;
everything else is run by the real interpreter. What shall go wrong stands in ``faults.json`` beside
the script: ``{"crash_at": 12}`` and so on, each used once unless ``"always"`` is true.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from workers.training.orders import (
    RUN,
    VERDICT,
    ConvertJob,
    Run,
    TrainerExit,
    TrainerJob,
    Verdict,
    read_order,
    write_order,
)
from workers.training.saved import checkpoint_at, checkpoint_name, checkpoints, seal

FAULTS = "faults.json"
STEP_S = 0.05


def install(folder: Path) -> Path:
    """Write the interpreter into ``folder``; answers its path."""
    script = folder / "python"
    words = f"{sys.executable} {Path(__file__).absolute()} {folder}"
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def set_faults(folder: Path, **faults: Any) -> None:
    """What shall go wrong from now on."""
    (folder / FAULTS).write_text(json.dumps(faults))


class StandIn:
    """One run. Steps of optimizer and iterations are the same here."""

    def __init__(self, home: Path, order: TrainerJob) -> None:
        self._home = home
        self._order = order
        self._work = Path(order.work_dir)
        config: dict[str, Any] = {}
        for node in ast.parse(Path(order.config).read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                with contextlib.suppress(ValueError):  # an expression: none of the settings
                    config[node.targets[0].id] = ast.literal_eval(node.value)
        self._total = int(config["total_iterations"])
        self._save_every = int(config["save_iterations"])
        self._batch = int(config["batch_size"])
        self._stop = False

    def train(self) -> None:
        signal.signal(signal.SIGTERM, self._hear)
        sys.stderr.write("the stand-in trains\n")
        scalars = self._work / str(time.time_ns()) / "vis_data" / "scalars.json"
        scalars.parent.mkdir(parents=True)
        per_epoch = max(1.0, self._total / 3)
        write_order(self._work / RUN, Run(1, self._total, self._batch, per_epoch))
        with open(scalars, "a") as out:
            for step in range(self._first(), self._total + 1):
                self._fault(step)
                time.sleep(STEP_S)
                row = {"step": step, "iter": step, "loss": 2 / step, "lr": 1e-3, "time": STEP_S}
                out.write(json.dumps(row) + "\n")
                out.flush()
                if self._stop or step % self._save_every == 0 or step == self._total:
                    self._save(step)
                if self._stop and step < self._total:
                    sys.exit(TrainerExit.STOPPED)

    def _first(self) -> int:
        if self._order.resume is None:
            return 1
        found = checkpoint_at(Path(self._order.resume))
        assert found is not None, self._order.resume
        return found.step + 1

    def _save(self, step: int) -> None:
        if shutil.disk_usage(self._work).free < self._needed_bytes():
            self._give_up("disk", step, TrainerExit.DISK_FULL)
        folder = self._work / checkpoint_name(step)
        folder.mkdir()
        try:
            (folder / "weights").write_bytes(bytes(self._order.checkpoint_bytes))
            seal(folder, iteration=step, step=step, created_at=int(time.time()), loss=2 / step)
        except OSError:
            shutil.rmtree(folder)
            self._give_up("disk", step, TrainerExit.DISK_FULL)
        for old in checkpoints(self._work)[: -self._order.keep_checkpoints]:
            shutil.rmtree(old.path)

    def _needed_bytes(self) -> int:
        return self._order.checkpoint_bytes + self._order.min_free_bytes

    def _give_up(self, reason: Any, step: int, status: TrainerExit) -> NoReturn:
        write_order(self._work / VERDICT, Verdict(reason, f"at step {step} {reason}", step))
        sys.exit(status)

    def _fault(self, step: int) -> None:
        path = self._home / FAULTS
        faults = json.loads(path.read_text()) if path.exists() else {}
        if faults.get("at") != step:
            return
        if not faults.get("always"):
            path.unlink()
        match faults["kind"]:
            case "nan":
                self._give_up("nan", step, TrainerExit.LOSS_BAD)
            case "crash":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)

    def _hear(self, *_: object) -> None:
        self._stop = True


def convert(order: ConvertJob) -> None:
    """The base itself is what comes of it."""
    out = Path(order.out)
    assert checkpoint_at(Path(order.checkpoint)) is not None
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(order.base, part)
    part.rename(out)


def main() -> None:
    home, *words = sys.argv[1:]
    match words:
        case ["-m", "workers.training.trainer", order]:
            StandIn(Path(home), read_order(Path(order), TrainerJob)).train()
        case ["-m", "workers.training.convert", order]:
            convert(read_order(Path(order), ConvertJob))
        case _:
            os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main()
