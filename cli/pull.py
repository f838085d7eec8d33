"""Bringing a checkpoint here: fetched beside its place, checked, then moved there in one step.

Files gather in a hidden folder next to the final one, each as ``NAME.part`` until its content is
proven. So whatever ends a pull half way, the next one goes on from there, and the final folder
is whole from its first moment.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cli import chosen_files
from cli.checkpoint_source import Source, SourceFile, has_content
from cli.hub import Hub
from cli.output import amount
from shared.checkpoints import INDEX, check_checkpoint, check_description, indexed_names
from shared.errors import CheckpointInvalid, InvalidValue, StorageFull
from shared.models import ModelSource
from shared.storage import TEMPORARY_SUFFIX, read_json, storage_errors, sync_folder, write_json

MARKER = ".vlmq-pull.json"
"""In a final folder: what it was pulled from."""
_LOCK = ".vlmq-pull.lock"


class Progress(Protocol):
    """Who is told how far a pull is."""

    def expect(self, total: int) -> None:
        """All files together have ``total`` bytes."""

    def begin(self, name: str) -> None:
        """From now on bytes are those of ``name``."""

    def arrived(self, count: int) -> None:
        """So many bytes more are here; negative when some must be fetched again."""

    def finish(self, name: str, size: int) -> None:
        """A file is complete and checked."""


class HubSource:
    """One revision at a hub, as a :class:`~cli.checkpoint_source.Source`."""

    def __init__(self, hub: Hub, repo: str, revision: str) -> None:
        self._hub = hub
        self._repo = repo
        self.listing = hub.list(repo, revision)

    def fetch(self, file: SourceFile, part: Path, arrived: Callable[[int], None]) -> None:
        """See :meth:`~cli.hub.Hub.fetch`. The commit is fetched, wherever the branch has moved."""
        self._hub.fetch(self._repo, self.listing.revision, file, part, arrived)

    def needed_bytes(self, missing: Iterable[SourceFile], folder: Path) -> int:
        """What arrived before needs no more room."""
        return sum(file.size - _present(folder / file.name) for file in missing)


def is_complete(folder: Path, source: ModelSource) -> bool:
    """Whether ``folder`` is a finished pull of exactly this.

    Raises: InvalidValue if something else is there, CheckpointInvalid if it is not whole any more.
    """
    marker = read_json(folder / MARKER) if folder.is_dir() else None
    if marker is None:
        with storage_errors(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise InvalidValue(
                    f"{folder} exists and was not pulled by this command; choose another folder, "
                    "or link it as it is: vlmq models link NAME FOLDER",
                    param="to",
                )
        return False
    if (marker.get("repo"), marker.get("revision")) != (source.repo, source.revision):
        raise InvalidValue(
            f"{folder} holds {marker.get('repo')} at {marker.get('revision')}; choose another "
            "folder for this revision",
            param="to",
        )
    try:
        check_checkpoint(folder, pickles=True)
    except CheckpointInvalid as error:
        raise CheckpointInvalid(
            f"{error.message}. It was whole when it was pulled: delete {folder} and pull again"
        ) from None
    return True


def pull(
    source: Source,
    described: ModelSource,
    final: Path,
    *,
    pickles: bool,
    keep_free: int,
    progress: Progress,
) -> bool:
    """Bring ``source`` into the folder ``final``. Returns False if it was there already.

    ``keep_free`` are bytes of the disk that must stay free. Raises: StorageFull with the figures,
    CheckpointInvalid, HubUnavailable, HubRefused, InvalidValue, StorageFailed.
    """
    staging = final.with_name(f".{final.name}.{described.revision[:40]}{TEMPORARY_SUFFIX}")
    with _alone(staging, described.repo):
        if is_complete(final, described):
            shutil.rmtree(staging)
            return False
        try:
            _gather(source, described, staging, pickles=pickles, free=keep_free, progress=progress)
        except StorageFull as error:
            raise StorageFull(
                f"{error.message} ({final.parent} is on that disk). What has arrived is kept: the "
                "same command goes on from there; --to chooses another disk"
            ) from None
        check_checkpoint(staging, pickles=pickles)
        write_json(staging / MARKER, described)
        _publish(staging, final)
    return True


def _gather(
    source: Source,
    described: ModelSource,
    staging: Path,
    *,
    pickles: bool,
    free: int,
    progress: Progress,
) -> None:
    """Fetch the small files, judge the model by them, then fetch its weights."""
    files = source.listing.files
    small = chosen_files.descriptions(files)
    _require_room(source, small, staging, free, described)
    if INDEX in files:
        _bring(source, files[INDEX], staging, Silent())
    weights = chosen_files.weights(files, _indexed(files, staging), pickles=pickles)
    _require_room(source, [*small, *weights], staging, free, described)
    progress.expect(sum(file.size for file in [*small, *weights]))
    for file in small:
        _bring(source, file, staging, progress)
    check_description(staging)
    for file in weights:
        _bring(source, file, staging, progress)


def _indexed(files: Mapping[str, SourceFile], staging: Path) -> list[str] | None:
    return list(indexed_names(staging / INDEX).values()) if INDEX in files else None


def _bring(source: Source, file: SourceFile, staging: Path, progress: Progress) -> None:
    """Have one file complete and proven in ``staging``."""
    path = staging / file.name
    progress.begin(file.name)
    if path.exists():  # it got its name after it was proven
        progress.arrived(file.size)
        progress.finish(file.name, file.size)
        return
    part = path.with_name(path.name + TEMPORARY_SUFFIX)
    with storage_errors(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _size(part) > file.size:
            part.unlink()
    progress.arrived(_size(part))
    source.fetch(file, part, progress.arrived)
    with storage_errors(part):
        proven = has_content(part, file)
        if not proven:
            part.unlink()
            raise CheckpointInvalid(
                f"{file.name} arrived with other bytes than the listing says, so it was deleted; "
                "run the same command again, which fetches only this file, and if that does not "
                "help the hub or a proxy on the way is at fault"
            )
        _sync_file(part)
        os.replace(part, path)
        sync_folder(path.parent)
    progress.finish(file.name, file.size)


def _require_room(
    source: Source, files: Iterable[SourceFile], staging: Path, free: int, described: ModelSource
) -> None:
    """Raises: StorageFull with what is needed and what is there."""
    missing = [file for file in files if not (staging / file.name).exists()]
    needed = source.needed_bytes(missing, staging)
    with storage_errors(staging):
        available = shutil.disk_usage(staging).free
    if needed and available < needed + free:
        raise StorageFull(
            f"{described.repo} needs {amount(needed)} more, {amount(free)} must stay free, and the "
            f"disk has {amount(available)}; free some space"
        )


def _publish(staging: Path, final: Path) -> None:
    with storage_errors(final):
        (staging / _LOCK).unlink()
        sync_folder(staging)
        os.rename(staging, final)
        sync_folder(final.parent)


@contextmanager
def _alone(staging: Path, repo: str) -> Iterator[None]:
    """Hold the folder of a pull for a block. Raises: InvalidValue while another process does."""
    with storage_errors(staging):
        staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidValue(
                f"another process is pulling {repo} into this place; wait for it, or stop it",
                param="repo_id",
            ) from None
        yield
    finally:
        os.close(descriptor)


class Silent:
    """Nobody is told."""

    def expect(self, total: int) -> None: ...

    def begin(self, name: str) -> None: ...

    def arrived(self, count: int) -> None: ...

    def finish(self, name: str, size: int) -> None: ...


def _sync_file(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _present(path: Path) -> int:
    """Bytes of a file that have arrived, complete or not."""
    return _size(path) or _size(path.with_name(path.name + TEMPORARY_SUFFIX))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
