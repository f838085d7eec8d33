"""The end of a fine-tune: its model under its name, its result files among the owner's files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec

from shared.clock import unix_now
from shared.errors import ModelNotFound
from shared.files import FileRecord
from shared.finetunes import FinetuneSpec
from shared.ids import derived_id
from shared.models import ModelDefaults
from shared.storage import atomic_file, storage_errors
from shared.stores import Stores
from shared.tunable import TRAINED_SYSTEM, require_tunable
from workers.training.job_folder import JobFolder

RESULTS_PURPOSE = "fine-tune-results"


def link_candidate(stores: Stores, spec: FinetuneSpec, folder: Path) -> None:
    """Have the tuned model loaded for its comparison; nobody else sees it yet."""
    if _record_is_ours(stores, spec.tuned_name, spec.id):
        return
    _link(stores, spec, spec.tuned_name, folder, candidate=True)


def link_checkpoint(stores: Stores, spec: FinetuneSpec, step: int, folder: Path) -> str:
    """Have a converted checkpoint served; answers the name it has."""
    name = f"{spec.tuned_name}:ckpt-step-{step}"
    if not _record_is_ours(stores, name, spec.id):
        _link(stores, spec, name, folder, candidate=False)
    return name


def drop_candidate(stores: Stores, spec: FinetuneSpec) -> None:
    """Forget a tuned model that did not get through its comparison; its folder stays."""
    try:
        if stores.models.get(spec.tuned_name).candidate:
            stores.models.remove(spec.tuned_name)
    except ModelNotFound:
        return


def publish_results(stores: Stores, spec: FinetuneSpec, folder: JobFolder) -> list[str]:
    """Put the result files among the owner's; done twice it gives the same files."""
    return [
        _publish(stores, spec, path)
        for path in (folder.comparison, folder.metrics)
        if path.exists()
    ]


def _record_is_ours(stores: Stores, name: str, job_id: str) -> bool:
    try:
        return stores.models.get(name).job == job_id
    except ModelNotFound:
        return False


def _link(stores: Stores, spec: FinetuneSpec, name: str, folder: Path, *, candidate: bool) -> None:
    base = stores.models.get(spec.model)
    stores.models.link(
        name,
        folder,
        engine=base.engine,
        # The code in the folder is the base's own, copied from there.
        trust_remote_code=base.trust_remote_code,
        owner=spec.owner,
        defaults=_defaults(base.defaults, spec, folder),
        replace=True,
        visible_to=spec.owner,
        base=base.name,
        job=spec.id,
        candidate=candidate,
    )


def _defaults(base: ModelDefaults, spec: FinetuneSpec, folder: Path) -> ModelDefaults:
    """The base's, and the system message that the rows were learnt under.

    A configuration of the owner's own may have set another one, so there the base's stays.
    """
    if base.system is not None or spec.config_file is not None:
        return base
    return msgspec.structs.replace(base, system=TRAINED_SYSTEM[require_tunable(spec.model, folder)])


def _publish(stores: Stores, spec: FinetuneSpec, path: Path) -> str:
    file_id = derived_id("file-", spec.id, path.name)
    home = stores.layout.file_dir(file_id)
    with storage_errors(home):
        home.mkdir(mode=0o700, exist_ok=True)
    with atomic_file(home / "content") as out, storage_errors(path), open(path, "rb") as content:
        shutil.copyfileobj(content, out)
    with open(path, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    record = FileRecord(
        id=file_id,
        owner=spec.owner,
        bytes=path.stat().st_size,
        created_at=unix_now(),
        filename=f"{spec.id}_{path.name}",
        purpose=RESULTS_PURPOSE,
        sha256=digest,
    )
    return stores.files.adopt(record).id
