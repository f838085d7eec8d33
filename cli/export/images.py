"""The encoded images that rows are about, from wherever this machine can get them."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import Self

from cli.client import Client, ServerTrouble
from cli.export.archives import Archives
from cli.export.names import Names, file_path
from cli.export.writing import LeftOut
from shared.ids import is_id
from shared.result_rows import ResultRow

MAX_BYTES = 256 << 20
"""Nothing larger is taken for an image."""
_MEDIA_TYPES = {
    "jpg": "image/jpeg",
    "png": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
    "bmp": "image/bmp",
    "tif": "image/tiff",
}


class Images:
    """Reads images: from the request, by the server's upload, or from this machine's disk.

    ``given`` is where the images are here, if not where the request says: the archive that was
    captioned, or a folder. In that, files are looked for by their name in the set, or by their address
    if that is below it. A context manager.
    """

    def __init__(self, client: Client, names: Names, given: Path | None) -> None:
        self._client = client
        self._names = names
        is_folder = given is not None and given.is_dir()
        self._root = given.resolve() if given is not None and is_folder else None
        self._archives = Archives(client, None if is_folder else given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archives.close()

    def read(self, row: ResultRow, url: str) -> bytes:
        """The encoded image at this address of the row's request. Raises: LeftOut."""
        if row.member:
            return self._archives.read(row.member, row.custom_id or "")
        if self._names.is_set:
            url = row.image or ""
        if is_inline(url):
            return _decoded(url)
        if is_id(url, "file-"):
            return self._uploaded(url)
        if url[:5].lower() in {"http:", "https"}:
            raise LeftOut("image_on_the_web", "images on the web are not fetched for an export")
        return _read_file(self._path(row, url))

    def _path(self, row: ResultRow, url: str) -> bytes:
        if self._root is not None:
            return b"/".join((os.fsencode(self._root), *self._names.below(row, self._root)))
        path = file_path(url)
        if not path.startswith("/"):
            raise LeftOut("image_not_found", "say with --images in which folder the images are")
        return self._names.encoded(path)

    def _uploaded(self, file_id: str) -> bytes:
        data = bytearray()
        try:
            for block in self._client.download(file_id):
                data += block
                if len(data) > MAX_BYTES:
                    raise LeftOut("image_too_large", f"{file_id} is too large for an image")
        except ServerTrouble as error:
            if error.status != 404:
                raise
            raise LeftOut("image_not_found", f"the file '{file_id}' was deleted") from None
        return bytes(data)


def is_inline(url: str) -> bool:
    """Whether the address holds the image itself."""
    return url[:5].lower() == "data:"


def extension(data: bytes) -> str:
    """What a file of these bytes ends in, by its content. Raises: LeftOut."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM"):
        return "bmp"
    if data.startswith((b"II*\0", b"MM\0*")):
        return "tif"
    raise LeftOut("unsupported_image", "what is there now is no image of a known kind")


def media_type(data: bytes) -> str:
    """The media type of these bytes. Raises: LeftOut."""
    return _MEDIA_TYPES[extension(data)]


def _decoded(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise LeftOut("image_unreadable", "the data: URL is not valid base64") from None


def _read_file(path: bytes) -> bytes:
    # Without O_NONBLOCK the open of a named pipe would wait for a writer for ever.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    shown = ascii(os.fsdecode(path))
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise LeftOut("image_not_found", f"cannot read {shown}: {what}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LeftOut("image_not_found", f"{shown} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise LeftOut("image_too_large", f"{shown} is too large for an image")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise LeftOut("image_unreadable", f"cannot read {shown}: {error.strerror}") from None
    finally:
        os.close(descriptor)
