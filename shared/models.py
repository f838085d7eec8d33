"""The registry of models: one small file per model on shared storage, read by every program.

Linking records where a checkpoint is and on what terms it may run; the checkpoint itself is
neither copied nor touched.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from urllib.parse import quote

import msgspec

from shared.checkpoints import CONFIG, check_checkpoint
from shared.clock import unix_now
from shared.errors import CheckpointInvalid, InvalidValue, ModelNotFound, StorageFailed
from shared.storage import Layout, read_json, storage_errors, write_json

MAX_NAME_CHARACTERS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_CACHE_S = 1.0


class ModelDefaults(msgspec.Struct, frozen=True):
    """What requests get that do not say; the usual parameters for InternVL2.

    ``system`` is the system message of requests without one; None: what the engine's chat template
    puts there, if anything.
    """

    max_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 40
    repetition_penalty: float = 1.0
    system: str | None = None


class ModelSource(msgspec.Struct, frozen=True):
    """Where a pulled checkpoint came from: ``revision`` is the exact commit.

    ``hub`` is the hub's address, or ``None`` for a folder that was carried here, whose revision
    may be a digest of its content.
    """

    hub: str | None
    repo: str
    revision: str


class ModelRecord(msgspec.Struct, frozen=True):
    """A linked model. ``path`` is its checkpoint's folder; ``visible_to`` one owner, or everyone.

    ``trust_remote_code`` is the consent of whoever linked it to run code from that folder.
    """

    name: str
    path: str | None
    engine: str | None
    trust_remote_code: bool
    created: int
    owned_by: str
    defaults: ModelDefaults = ModelDefaults()
    visible_to: str | None = None
    source: ModelSource | None = None
    base: str | None = None
    """The model that this one was tuned from; nodes that serve the base serve it, too."""
    job: str | None = None
    """The fine-tune that made it."""
    candidate: bool = False
    """Loaded for its own job's comparison only; nobody else sees it yet."""
    revision: int = 1
    """Grows when the model is linked anew or reloaded; nodes then replace their engines."""


class ModelRegistry:
    """Link, look up, list and remove models."""

    def __init__(self, layout: Layout) -> None:
        self._folder = layout.models
        self._cache: dict[str, ModelRecord] = {}
        self._cached_at = float("-inf")
        self._lock = threading.Lock()

    def link(
        self,
        name: str,
        path: Path | None,
        *,
        engine: str | None = None,
        trust_remote_code: bool = False,
        owner: str = "vlmq",
        defaults: ModelDefaults = ModelDefaults(),  # noqa: B008 - frozen
        replace: bool = False,
        source: ModelSource | None = None,
        visible_to: str | None = None,
        base: str | None = None,
        job: str | None = None,
        candidate: bool = False,
    ) -> ModelRecord:
        """Record a model under ``name``. ``path`` may be ``None`` for engines without weights.

        A model with ``base`` is served wherever that one is, as that one is.

        Raises: InvalidValue, or CheckpointInvalid naming what is wrong with the folder.
        """
        self.require_free(name, replace=replace)
        if path is not None:
            path = _checked_folder(path, engine, pickles=trust_remote_code)
        present = self._read_all().get(name)
        record = ModelRecord(
            name=name,
            path=None if path is None else str(path),
            engine=engine,
            trust_remote_code=trust_remote_code,
            created=unix_now(),
            owned_by=owner,
            defaults=defaults,
            visible_to=visible_to,
            source=source,
            base=base,
            job=job,
            candidate=candidate,
            revision=1 if present is None else present.revision + 1,
        )
        return self._write(record)

    def require_free(self, name: str, *, replace: bool) -> None:
        """Make sure that a model could be linked as ``name``. Raises: InvalidValue."""
        if not _NAME.fullmatch(name) or ".." in name:
            raise InvalidValue(
                "a model's name starts with a letter or digit and holds at most 128 letters, "
                "digits and . _ : / @ + -",
                param="name",
            )
        if not replace and name in self._read_all():
            raise InvalidValue(
                f"a model named '{name}' is linked already; --replace takes its place", param="name"
            )

    def reload(self, name: str) -> ModelRecord:
        """Ask the nodes that serve ``name`` to load it anew. Raises: ModelNotFound."""
        present = self._present(name)
        return self._write(msgspec.structs.replace(present, revision=present.revision + 1))

    def publish(self, name: str) -> ModelRecord:
        """Make a candidate a registered model; its engines stay loaded. Raises: ModelNotFound."""
        return self._write(msgspec.structs.replace(self._present(name), candidate=False))

    def get(self, name: str) -> ModelRecord:
        """The model ``name``. Raises: ModelNotFound. What is known of it may be a second old."""
        record = self._find(name)
        if record is None:
            raise ModelNotFound(
                f"there is no model '{name}'; GET /v1/models lists those linked", param="model"
            )
        return record

    def knows(self, name: str, owner: str) -> bool:
        """Whether ``name`` is linked and ``owner`` may use it."""
        record = self._find(name)
        return record is not None and record.visible_to in (None, owner)

    def list(self) -> list[ModelRecord]:
        """All models, by name."""
        return sorted(self._read_all().values(), key=lambda record: record.name)

    def by_name(self) -> dict[str, ModelRecord]:
        """All models by name, for programs that drop what is missing.

        Raises: StorageFailed, also where the registry's folder is missing: a disk that is not
        mounted must not be taken for an empty registry.
        """
        found = self._read_all()
        if not self._folder.is_dir():
            raise StorageFailed(f"{self._folder} is not there; is the shared storage mounted?")
        return found

    def remove(self, name: str) -> None:
        """Forget a model; its folder stays. What was tuned from it is served like its own base.

        Raises: ModelNotFound.
        """
        base = self._present(name).base
        if base is not None:
            for record in self._read_all().values():
                if record.base == name:
                    self._write(msgspec.structs.replace(record, base=base))
        with storage_errors(self._folder):
            try:
                self._file(name).unlink()
            except FileNotFoundError:
                raise ModelNotFound(f"there is no model '{name}'", param="name") from None
        self._cached_at = float("-inf")

    def _find(self, name: str) -> ModelRecord | None:
        # Whoever just linked a model may use it at once.
        known = self._all().get(name)
        if known is None and _NAME.fullmatch(name):
            return _read(self._file(name))
        return known

    def _present(self, name: str) -> ModelRecord:
        record = _read(self._file(name)) if _NAME.fullmatch(name) else None
        if record is None:
            raise ModelNotFound(f"there is no model '{name}'", param="name")
        return record

    def _write(self, record: ModelRecord) -> ModelRecord:
        write_json(self._file(record.name), record)
        self._cached_at = float("-inf")
        return record

    def _file(self, name: str) -> Path:
        return self._folder / f"{quote(name, safe='')}.json"

    def _all(self) -> dict[str, ModelRecord]:
        with self._lock:
            if time.monotonic() - self._cached_at > _CACHE_S:
                self._cache = self._read_all()
                self._cached_at = time.monotonic()
            return self._cache

    def _read_all(self) -> dict[str, ModelRecord]:
        found: dict[str, ModelRecord] = {}
        for path in self._folder.glob("*.json"):
            if path.name.startswith("."):
                continue
            record = _read(path)
            if record is not None:
                found[record.name] = record
        return found


def _read(path: Path) -> ModelRecord | None:
    value = read_json(path)
    if value is None:
        return None
    try:
        return msgspec.convert(value, ModelRecord)
    except msgspec.ValidationError as error:
        raise StorageFailed(f"{path} is not a model record: {error}") from error


def _checked_folder(path: Path, engine: str | None, *, pickles: bool) -> Path:
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        raise InvalidValue(f"{folder} is not a folder", param="path")
    if reads_checkpoints(engine):
        check_checkpoint(folder, pickles=pickles)
    elif not (folder / CONFIG).is_file():
        raise CheckpointInvalid(f"{folder} holds no {CONFIG}; is it a checkpoint?", param="path")
    return folder


def reads_checkpoints(engine: str | None) -> bool:
    """Whether the engine's folders must be whole checkpoints; engines of one's own may differ."""
    return engine in {None, "transformers", "lmdeploy"}
