"""What a checkpoint can be pulled from: a listing of files that may be trusted to stay in a folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shared.errors import CheckpointInvalid

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f\x7f\\/]{1,200}")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file by its path below the checkpoint's folder; at most one of the digests is known."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Listing:
    """All files of one revision; ``revision`` is exact: a commit, or a digest of the content."""

    revision: str
    files: dict[str, SourceFile]


class Source(Protocol):
    """One revision of one checkpoint, wherever it is."""

    listing: Listing

    def fetch(self, file: SourceFile, part: Path, arrived: Callable[[int], None]) -> None:
        """Complete ``part``; says how many bytes came."""

    def needed_bytes(self, missing: Iterable[SourceFile], folder: Path) -> int:
        """How much room ``missing`` will take on the disk of ``folder``."""


def checked_files(repo: str, revision: str | None, files: Iterable[SourceFile]) -> Listing:
    """A listing that names only files below its folder, each once and with its size.

    Raises: CheckpointInvalid.
    """
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise CheckpointInvalid(f"{repo} is listed without a proper commit: {revision!a:.80}")
    found: dict[str, SourceFile] = {}
    for file in files:
        if not all(_PART.fullmatch(part) and _printable(part) for part in file.name.split("/")):
            raise CheckpointInvalid(
                f"{repo} lists a file whose name leads out of its folder: {file.name!a:.80}; "
                "nothing was taken from there"
            )
        if file.name in found or file.size < 0:
            raise CheckpointInvalid(f"{repo} lists {file.name} twice or without its size")
        found[file.name] = file
    return Listing(revision, found)


def has_content(path: Path, file: SourceFile) -> bool:
    """Whether a file's bytes are those of the listing, by size and digest."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return digest(path, hashlib.sha256()) == file.sha256
    if file.git_sha1 is not None:
        blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        return digest(path, blob) == file.git_sha1
    return True


def digest(path: Path, begun: hashlib._Hash) -> str:
    """The hexadecimal digest of a file's bytes after what ``begun`` has seen."""
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            begun.update(block)
    return begun.hexdigest()


def _printable(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return False
    return True
