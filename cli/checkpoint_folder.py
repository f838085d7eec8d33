"""A checkpoint that was carried here: a plain folder, or the cache of ``huggingface_hub``."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from cli.checkpoint_source import Listing, SourceFile, checked_files, digest
from cli.chosen_files import is_wanted
from shared.errors import CheckpointInvalid, InvalidValue
from shared.storage import storage_errors, write_all

_BLOCK_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


class CheckpointFolder:
    """A :class:`~cli.checkpoint_source.Source` of files on this machine.

    In a cache, links may lead to the cache's own blobs, whose names are the digests of their
    content. Everywhere else a link that leads out of the folder is refused.
    """

    def __init__(self, folder: Path, repo: str, revision: str | None) -> None:
        with storage_errors(folder):
            self._folder, self._root, found = _find(folder.expanduser().absolute(), repo, revision)
            files = list(self._files())
            self.listing: Listing = checked_files(
                repo, found or _content_revision(self._folder, files), files
            )

    def fetch(self, file: SourceFile, part: Path, arrived: Callable[[int], None]) -> None:
        """Make ``part`` another name of the file, or a copy where that cannot be."""
        origin = (self._folder / file.name).resolve()
        with storage_errors(part):
            part.unlink(missing_ok=True)
            with suppress(OSError):  # another disk, or one without links: copy
                os.link(origin, part)
                arrived(file.size)
                return
            with open(origin, "rb") as stream, open(part, "wb", buffering=0) as out:
                while block := stream.read(_BLOCK_BYTES):
                    write_all(out, block)
                    arrived(len(block))

    def needed_bytes(self, missing: Iterable[SourceFile], folder: Path) -> int:
        """Links take no room; on another disk each file takes its size."""
        if self._folder.stat().st_dev == folder.stat().st_dev:
            return 0
        return sum(file.size for file in missing)

    def _files(self) -> Iterator[SourceFile]:
        for place, folders, names in os.walk(self._folder, onerror=_fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(place, name)
                relative = str(path.relative_to(self._folder))
                if not is_wanted(relative):
                    continue
                origin = path.resolve()
                if not origin.is_relative_to(self._root):
                    raise CheckpointInvalid(
                        f"{path} is a link that leads out of {self._root}; put the file itself there"
                    )
                if not origin.is_file():
                    raise CheckpointInvalid(f"{path} is not a file, or leads nowhere")
                blob = origin.name if origin.parent == self._root / "blobs" else ""
                yield SourceFile(
                    relative,
                    origin.stat().st_size,
                    sha256=blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None,
                    git_sha1=blob if _COMMIT.fullmatch(blob) else None,
                )


def _fail(error: OSError) -> None:
    """A folder that cannot be listed must not look empty."""
    raise error


def _find(folder: Path, repo: str, revision: str | None) -> tuple[Path, Path, str | None]:
    """The folder with the files, the one that links may not leave, and the revision if it is known."""
    if not folder.is_dir():
        raise InvalidValue(f"{folder} is not a folder", param="from")
    cached = f"models--{repo.replace('/', '--')}"
    for root in (folder, folder / cached, folder / "hub" / cached):
        if (root / "snapshots").is_dir():
            return _snapshot(root.resolve(), revision)
    if folder.parent.name == "snapshots":
        return folder.resolve(), folder.parent.parent.resolve(), folder.name
    return folder.resolve(), folder.resolve(), revision


def _snapshot(root: Path, revision: str | None) -> tuple[Path, Path, str]:
    wanted = revision or "main"
    if ".." in wanted.split("/") or wanted.startswith("/"):
        raise InvalidValue(f"'{wanted}' is no revision", param="revision")
    reference = root / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    present = sorted(path.name for path in (root / "snapshots").iterdir() if path.is_dir())
    if commit not in present and revision is None and len(present) == 1:
        commit = present[0]
    if commit not in present:
        raise InvalidValue(
            f"{root} has no revision '{wanted}'; it has {', '.join(present) or 'none'}",
            param="revision",
        )
    return root / "snapshots" / commit, root, commit


def _content_revision(folder: Path, files: Iterable[SourceFile]) -> str:
    """A name for what the folder holds now: the same files give the same one."""
    whole = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        content = digest(folder / file.name, hashlib.sha256())
        whole.update(f"{content} {file.name}\n".encode())
    return f"sha256-{whole.hexdigest()[:32]}"
