"""Shards: the finished lines of one chunk, in one file named by chunk and fencing token.

A shard is a header line padded to a multiple of 256 bytes, then the output lines, then the error lines;
for an image set also what they came of, as JSON. The token in
the name makes a late writer harmless: its name is never committed. Where Redis was lost, the
highest token of a chunk is the committed one, for a committed chunk is never claimed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from shared.errors import StorageFailed
from shared.storage import atomic_file, storage_errors

_HEADER_BYTES = 256
_MAX_HEADER_BYTES = 256 * _HEADER_BYTES
_NAME = re.compile(r"(?P<chunk>\d{8})-(?P<token>\d{10})\.shard")


class ShardHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a shard holds: bytes and lines of each part, and the tokens and images of its answers.

    ``provenance_bytes`` is the length of the JSON at its end that says what the answers came of;
    ``counts`` say why lines failed and what the quality gate found, as :mod:`shared.tally` names it.
    """

    output_bytes: int
    error_bytes: int
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    images: int = 0
    provenance_bytes: int = 0
    counts: dict[str, int] = {}

    @property
    def header_bytes(self) -> int:
        """The length of the header line: of as many blocks as it needs."""
        return _HEADER_BYTES * (1 + len(msgspec.json.encode(self)) // _HEADER_BYTES)

    @property
    def shard_bytes(self) -> int:
        """The size of the whole shard."""
        return self.header_bytes + self.output_bytes + self.error_bytes + self.provenance_bytes


def shard_path(batch_dir: Path, chunk: int, token: int) -> Path:
    """The shard that the holder of ``token`` writes for ``chunk``."""
    return batch_dir / "shards" / f"{chunk:08d}-{token:010d}.shard"


def write_shard(
    path: Path, header: ShardHeader, output: bytes, errors: bytes, provenance: bytes = b""
) -> None:
    """Write a shard, whole and durable. Raises: StorageFull, StorageFailed."""
    line = msgspec.json.encode(header)
    with atomic_file(path) as stream:
        stream.write(line.ljust(header.header_bytes - 1) + b"\n")
        stream.write(output)
        stream.write(errors)
        stream.write(provenance)


def read_header(path: Path) -> ShardHeader:
    """The header of a shard. Raises: StorageFailed if the file is missing, damaged or cut short."""
    with storage_errors(path), open(path, "rb") as stream:
        line = stream.readline(_MAX_HEADER_BYTES)
        size = os.fstat(stream.fileno()).st_size
    try:
        header = msgspec.json.decode(line, type=ShardHeader)
    except msgspec.DecodeError as error:
        raise StorageFailed(f"{path} is damaged: {error}") from error
    if size != header.shard_bytes:
        raise StorageFailed(f"{path} is damaged: it has {size} bytes")
    return header


def read_provenance(path: Path, header: ShardHeader) -> bytes:
    """What the shard's answers came of, as JSON; empty if it does not say. Raises: StorageFailed."""
    if not header.provenance_bytes:
        return b""
    with storage_errors(path), open(path, "rb") as stream:
        stream.seek(header.shard_bytes - header.provenance_bytes)
        return stream.read(header.provenance_bytes)


def output_part(header: ShardHeader) -> tuple[int, int]:
    """Where the output lines are in the shard: offset and length in bytes."""
    return header.header_bytes, header.output_bytes


def error_part(header: ShardHeader) -> tuple[int, int]:
    """Where the error lines are in the shard: offset and length in bytes."""
    return header.header_bytes + header.output_bytes, header.error_bytes


def copy_output(path: Path, header: ShardHeader, target: BinaryIO) -> None:
    """Append the shard's output lines to ``target``, an unbuffered file."""
    _copy(path, *output_part(header), target)


def copy_errors(path: Path, header: ShardHeader, target: BinaryIO) -> None:
    """Append the shard's error lines to ``target``, an unbuffered file."""
    _copy(path, *error_part(header), target)


def _copy(path: Path, offset: int, length: int, target: BinaryIO) -> None:
    with storage_errors(path), open(path, "rb") as stream:
        while length > 0:
            sent = os.sendfile(target.fileno(), stream.fileno(), offset, length)
            if sent == 0:
                raise StorageFailed(f"{path} ended early")
            offset += sent
            length -= sent


def find_shards(batch_dir: Path) -> Iterator[tuple[int, int, Path]]:
    """All whole shards as ``(chunk, token, path)``, in no order."""
    folder = batch_dir / "shards"
    if not folder.exists():
        return
    with storage_errors(folder), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match:
                yield int(match["chunk"]), int(match["token"]), Path(entry.path)
