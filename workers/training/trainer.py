"""Runs xtuner's training with this project's hooks: ``python -m workers.training.trainer JOB.json``.

``xtuner train`` hides how its child ends, so its ``tools/train.py`` is run itself, in this process
(several GPUs: one process each, started here). The exit status is a
:class:`~workers.training.orders.TrainerExit`; anything else is a crash.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from workers.training import ranks, surroundings
from workers.training.orders import TrainerJob, read_order
from workers.training.saved import checkpoint_at
from workers.training.stopping import StopRequest


def main(arguments: list[str]) -> None:
    """Command line. Ends by SystemExit unless training went to its end."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m workers.training.trainer JOB.json")
    path = Path(arguments[0])
    job = read_order(path, TrainerJob)
    if job.gpus > 1 and ranks.MARK not in os.environ:
        command = [sys.executable, "-m", "workers.training.trainer", str(path)]
        raise SystemExit(ranks.run(command, job.gpus))
    train(job)


def train(job: TrainerJob) -> None:
    """Train in this process, to the end. Raises: SystemExit with a TrainerExit otherwise."""
    stop = StopRequest()
    stop.listen()
    if job.resume is not None:
        require_fit(Path(job.resume), max(1, job.gpus))
    work_dir = Path(job.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    cache_dir = Path(job.cache_dir) if job.cache_dir else work_dir / "cache"
    surroundings.prepare_environment(cache_dir, modules=work_dir / "modules")
    if ranks.MARK not in os.environ:
        surroundings.single_process_group()
    surroundings.prepare_imports()
    provide_base(Path(job.base), Path(job.model_path))
    import deepspeed  # before mmengine, which swallows what this raises

    surroundings.skip_compiling()
    on_gpus = surroundings.has_gpu()
    if job.gpus > 1 and not on_gpus:
        # mmengine's launcher takes for granted that there are GPUs.
        deepspeed.init_distributed(dist_backend="gloo")
    import xtuner

    from workers.training.takeover import take_over

    surroundings.attend_without_flash()
    take_over(job, stop)
    script = Path(xtuner.__file__).parent / "tools" / "train.py"
    sys.argv = [str(script), *train_arguments(job, on_gpus=on_gpus)]
    runpy.run_path(str(script), run_name="__main__")


def require_fit(checkpoint: Path, processes: int) -> None:
    """Make sure that a checkpoint is whole and of as many processes. Raises: SystemExit."""
    if checkpoint_at(checkpoint) is None:
        raise SystemExit(f"{checkpoint} is not whole; resume from an earlier one")
    parts = len(list(checkpoint.glob("*optim_states.pt")))
    if parts != processes:
        raise SystemExit(
            f"{checkpoint} is of {parts} GPUs and this run has {processes}; DeepSpeed cannot divide it "
            "anew, so resume with as many as before"
        )


def train_arguments(job: TrainerJob, *, on_gpus: bool) -> list[str]:
    """What xtuner's ``tools/train.py`` is given."""
    arguments = [job.config, "--work-dir", job.work_dir, "--deepspeed", job.deepspeed]
    arguments += ["--launcher", "pytorch"] if job.gpus > 1 and on_gpus else []
    return [*arguments, *(["--resume", job.resume] if job.resume else ["--seed", str(job.seed)])]


def provide_base(base: Path, model_path: Path) -> None:
    """Make sure that ``model_path`` is a checkpoint with code of its own, as xtuner needs it.

    A base without code (it is read by this project's own network) is copied with that network's
    files added; its weights are linked, not copied, where the file system can.
    """
    if model_path == base or (model_path / "config.json").is_file():
        return
    from workers.inference.internvl.export import add_code

    part = model_path.with_name(f".{model_path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part, copy_function=_link_weights)
    add_code(part)
    try:
        part.rename(model_path)
    except OSError:
        # Another process of this job was faster.
        if not (model_path / "config.json").is_file():
            raise
        shutil.rmtree(part)


def _link_weights(source: str, target: str) -> str:
    if source.endswith(".safetensors"):
        Path(target).symlink_to(Path(source).resolve())
        return target
    return shutil.copyfile(source, target)


if __name__ == "__main__":
    main(sys.argv[1:])
