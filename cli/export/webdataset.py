"""WebDataset: tar files in which an image, its caption and the flat row share one key.

Keys are the lines' numbers, so that no name of an image can break the format; the name is in the row.
"""

from __future__ import annotations

import tarfile
from contextlib import ExitStack
from pathlib import PurePath
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from cli.export.images import Images, extension
from cli.export.staging import Staging
from cli.export.writing import LeftOut
from shared.result_rows import ResultRow, images_of

_encoder = msgspec.json.Encoder()


class WebDatasetWriter:
    """Writes ``NAME.tar``, or ``NAME-000000.tar`` and so on with ``shard_items`` images in each.

    A context manager, inside of which the tars are open.
    """

    def __init__(
        self, staging: Staging, name: str, images: Images, *, shard_items: int | None
    ) -> None:
        self._staging = staging
        self._name = PurePath(name)
        self._images = images
        self._shard_items = shard_items
        self._open = ExitStack()
        self._shards = 0
        self._items = 0
        self._begin()

    def add(self, row: ResultRow) -> None:
        """Write one sample. Raises: LeftOut if its image cannot be had."""
        urls = images_of(row.messages or [])
        if len(urls) != 1:
            raise LeftOut("several_images" if urls else "no_image", f"it shows {len(urls)} images")
        data = self._images.read(row, urls[0])
        suffix = extension(data)
        if self._items == self._shard_items:
            self._end()
            self._begin()
        self._items += 1
        key = f"{row.line:012d}"
        flat = msgspec.structs.replace(row, messages=msgspec.UNSET, member=msgspec.UNSET)
        self._member(f"{key}.{suffix}", data)
        self._member(f"{key}.txt", (row.caption or "").encode())
        self._member(f"{key}.json", _encoder.encode(flat))

    def close(self) -> None:
        """End the last tar."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of what is open."""
        self._open.__exit__(kind, error, trace)

    def _begin(self) -> None:
        name = self._name
        if self._shard_items is not None:
            name = name.with_name(shard_name(name.name, self._shards))
        self._stream: BinaryIO = self._open.enter_context(self._staging.file(str(name)))
        self._shards += 1
        self._items = 0

    def _end(self) -> None:
        self._stream.write(bytes(2 * tarfile.BLOCKSIZE))
        self._open.close()

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._stream.write(info.tobuf(tarfile.USTAR_FORMAT))
        self._stream.write(data)
        self._stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def shard_name(name: str, index: int) -> str:
    """The name of a shard: ``captions-000003.tar`` of ``captions.tar``."""
    path = PurePath(name)
    return f"{path.stem}-{index:06d}{path.suffix}"
