"""What a job comes to on this machine: recipe resolved, configuration written, order for the trainer."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import (
    BaseModelGone,
    CheckpointInvalid,
    ModelNotFound,
    NotEnoughDisk,
    NotFound,
    StorageFull,
    TrainingConfigInvalid,
    TrainingDataGone,
)
from shared.finetunes import FinetuneSpec
from shared.models import ModelRecord
from shared.process import usable_cores
from shared.storage import storage_errors, write_bytes
from shared.stores import Stores
from shared.tunable import require_consent
from workers.machine import look_at_machine
from workers.training.base_facts import BaseFacts, read_base_facts
from workers.training.config import (
    Hardware,
    Resolved,
    TrainingPaths,
    deepspeed_file,
    fill,
    render,
    resolve,
)
from workers.training.data_report import DataReport
from workers.training.dataset import read_report
from workers.training.job_folder import JobFolder
from workers.training.orders import Speed, TrainerJob, write_order
from workers.training.saved import SavedCheckpoint

CONFIG = "config.py"
ORDER = "trainer.json"
LOG = "trainer.log"


@dataclass(frozen=True)
class Base:
    """The model to be tuned."""

    record: ModelRecord
    path: Path
    facts: BaseFacts


@dataclass(frozen=True)
class Plan:
    """One attempt, ready to be started. ``command`` is for the training interpreter."""

    resolved: Resolved
    config: str
    order: Path
    log: Path


def find_base(stores: Stores, name: str) -> Base:
    """The base of a job. Raises: BaseModelGone; InvalidRequest if it cannot or may not be tuned."""
    try:
        record = stores.models.get(name)
    except ModelNotFound:
        raise BaseModelGone(f"the base model '{name}' is not linked any more") from None
    if record.path is None or not Path(record.path).is_dir():
        raise BaseModelGone(
            f"the folder of the base model '{name}' is gone ({record.path}); put it back, or link "
            "the model anew, and create the job again"
        )
    path = Path(record.path)
    require_consent(record)
    try:
        return Base(record, path, read_base_facts(path))
    except CheckpointInvalid as error:
        raise BaseModelGone(
            f"the base model '{name}' is not whole any more: {error.message}"
        ) from None


def find_report(folder: JobFolder) -> DataReport:
    """What the job's data is. Raises: TrainingDataGone."""
    report = read_report(folder.path)
    if report is None or not folder.rows.is_file():
        raise TrainingDataGone()
    return report


def look_at_hardware(gpus: Sequence[str], folder: JobFolder, min_free_bytes: int) -> Hardware:
    """What a job gets: these GPUs, or the processor. Its own checkpoints count as free space."""
    machine = look_at_machine(gpus)
    memory = [machine.gpu_bytes.get(gpu, 0) for gpu in gpus] or [_memory_bytes()]
    with storage_errors(folder.path):
        free = shutil.disk_usage(folder.path).free
    saved = sum(checkpoint.size_bytes for checkpoint in folder.saved())
    return Hardware(
        gpus=len(gpus),
        memory_bytes=min(memory),
        cores=usable_cores(),
        free_disk_bytes=max(0, free + saved - min_free_bytes),
    )


def resolve_job(spec: FinetuneSpec, report: DataReport, base: Base, hardware: Hardware) -> Resolved:
    """The recipe with nothing left to choose. Raises: InvalidRequest, NotEnoughDisk."""
    try:
        return resolve(
            spec.recipe,
            rows=report.train,
            longest_tokens=report.tokens.max or None,
            seed=spec.seed,
            base=base.facts,
            hardware=hardware,
        )
    except StorageFull as error:
        raise NotEnoughDisk(error.message) from None


def model_path(base: Base, folder: JobFolder) -> Path:
    """What the configuration calls the base: a copy with code, where the base itself has none."""
    return base.path if base.facts.has_code else folder.path / "base"


def config_text(
    spec: FinetuneSpec, stores: Stores, resolved: Resolved, base: Base, folder: JobFolder
) -> str:
    """The configuration: rendered from the template, or the owner's own with our places in it.

    Raises: TrainingConfigInvalid.
    """
    paths = TrainingPaths(
        model_path=model_path(base, folder), data_path=folder.rows, image_folder=folder.images
    )
    if spec.config_file is None:
        return render(resolved, paths)
    try:
        own = stores.files.content_path(spec.owner, spec.config_file).read_text(encoding="utf-8")
    except (NotFound, OSError):
        raise TrainingConfigInvalid(
            f"the file '{spec.config_file}' is gone; upload it again", param="config_file"
        ) from None
    except UnicodeDecodeError:
        raise TrainingConfigInvalid(
            "it is not UTF-8 text; send the Python file itself", param="config_file"
        ) from None
    return _placed(own, paths)


def write_plan(
    token: int,
    folder: JobFolder,
    base: Base,
    resolved: Resolved,
    config: str,
    *,
    resume: SavedCheckpoint | None,
    cache: Path,
    min_free_bytes: int,
) -> Plan:
    """Write the attempt's files. Raises: StorageFull, StorageFailed."""
    work = folder.attempt(token)
    orders = work / "order"
    with storage_errors(orders):
        orders.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_bytes(orders / CONFIG, config.encode())
    write_order(
        orders / ORDER,
        TrainerJob(
            config=str(orders / CONFIG),
            work_dir=str(work),
            deepspeed=str(deepspeed_file(resolved.deepspeed)),
            base=str(base.path),
            model_path=str(model_path(base, folder)),
            seed=resolved.seed,
            gpus=resolved.gpus,
            resume=str(resume.path) if resume is not None else None,
            speed=Speed(
                attention=resolved.attention,
                gradient_checkpointing=resolved.gradient_checkpointing,
            ),
            keep_checkpoints=resolved.keep_checkpoints,
            checkpoint_bytes=resume.size_bytes if resume else resolved.checkpoint_bytes,
            min_free_bytes=min_free_bytes,
            cache_dir=str(cache),
        ),
    )
    return Plan(resolved, config, orders / ORDER, work / LOG)


def config_of(checkpoint: SavedCheckpoint) -> Path:
    """The configuration that a checkpoint was trained with."""
    return checkpoint.path.parent / "order" / CONFIG


def _placed(config: str, paths: TrainingPaths) -> str:
    """An owner's configuration with the job's base and data in the place of its own."""
    try:
        body = ast.parse(config).body
    except SyntaxError as error:
        raise TrainingConfigInvalid(
            f"it is no valid Python: line {error.lineno}: {error.msg}", param="config_file"
        ) from None
    assigned = {
        node.targets[0].id
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.value.lineno == node.value.end_lineno
    }
    values = {
        "model_path": str(paths.model_path),
        "path": str(paths.model_path),
        "data_path": str(paths.data_path),
        "image_folder": str(paths.image_folder),
    }
    found = {name: value for name, value in values.items() if name in assigned}
    if (
        not {"data_path", "image_folder"} <= found.keys()
        or not {"model_path", "path"} & found.keys()
    ):
        raise TrainingConfigInvalid(
            "it must set path (or model_path), data_path and image_folder on a line of its own each, "
            "as xtuner's InternVL configurations do; the job's base and data are put there",
            param="config_file",
        )
    return fill(config, found)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
