"""Get the image that a request names, from wherever it may be, verified.

Four kinds of place: a ``data:`` URL, the id of an uploaded file, a path (or ``file://`` URL) under
a configured root, and ``http(s)``. Everything else is refused with what to write instead.
"""

from __future__ import annotations

import binascii
import copy
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from shared.errors import ImageForbidden, ImageTooLarge, ImageUnreadable
from shared.ids import is_id
from shared.settings import ImageSettings
from workers.inference.engines.base import Detail, Image, Tiling
from workers.inference.image_fetch import ImageFetcher
from workers.inference.image_files import ImageRoots, read_file, shown
from workers.inference.images import DecodeRoom, prepare

OpenUpload = Callable[[str], Path]
"""From a file id to its path, if the asker owns it; raises ImageNotFound or ImageForbidden."""

MAX_MEDIA_TYPE_CHARACTERS = 256


class ImageReader:
    """Reads and verifies images. One serves all threads of a process."""

    def __init__(
        self,
        settings: ImageSettings,
        open_upload: OpenUpload,
        fetcher: ImageFetcher | None = None,
    ) -> None:
        self._settings = settings
        self._open_upload = open_upload
        self._roots = ImageRoots(settings.roots, settings.max_bytes)
        self._fetcher = fetcher or ImageFetcher(settings)
        self._room = DecodeRoom(settings.max_pixels)

    def read(self, url: str, detail: Detail = "auto", tiling: Tiling | None = None) -> Image:
        """The image at ``url``, cut as ``tiling`` says; without one, as its encoded file.

        Blocks while it reads. Raises: a subclass of ImageError that says what to do, or
        StorageFailed (retryable) if the disk fails.
        """
        return prepare(self.load(url), self._settings, tiling, detail, self._room)

    def prepare(self, data: bytes, detail: Detail, tiling: Tiling | None) -> Image:
        """The image whose encoded file is ``data``. Raises: as ``read``."""
        return prepare(data, self._settings, tiling, detail, self._room)

    def with_uploads(self, open_upload: OpenUpload) -> ImageReader:
        """The same reader, for somebody with other uploads."""
        reader = copy.copy(self)
        reader._open_upload = open_upload  # noqa: SLF001 - a copy of ourselves
        return reader

    def close(self) -> None:
        """Close idle connections to image servers."""
        self._fetcher.close()

    def load(self, url: str) -> bytes:
        """The encoded file at ``url``, not yet looked at. Raises: as ``read``."""
        if url.startswith("/"):
            return self._roots.read(url)
        if is_id(url, "file-"):
            return read_file(self._open_upload(url), url, self._settings.max_bytes)
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return read_data_url(url, self._settings.max_bytes)
        if scheme in ("http", "https"):
            return self._fetcher.fetch(url)
        if scheme == "file":
            return self._roots.read(_path_of(url))
        raise ImageForbidden(
            f"cannot read an image from {shown(url[:60])}; give a data: URL, the id of an uploaded "
            "file, an absolute path under a configured folder, or an http(s) URL"
        )


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes in a ``data:…;base64,…`` URL. The media type is ignored: the bytes decide.

    Only plain base64 (RFC 4648, one line, padded) is taken; percent-encoding is not.

    Raises: ImageUnreadable or ImageTooLarge, before anything is decoded.
    """
    comma = url.find(",", 0, MAX_MEDIA_TYPE_CHARACTERS)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise ImageUnreadable(
            "the data: URL must look like data:image/jpeg;base64,<the file's bytes in base64>"
        )
    if (len(url) - comma - 1) // 4 * 3 - 2 > max_bytes:
        raise ImageTooLarge(
            f"the image in the data: URL has more than the {max_bytes:,} bytes this server accepts"
        )
    try:
        return binascii.a2b_base64(url[comma + 1 :], strict_mode=True)
    except (binascii.Error, ValueError):
        raise ImageUnreadable(
            "the data: URL is not valid base64: use the standard alphabet with padding and no line "
            "breaks, as 'base64 -w0' prints it"
        ) from None


def _path_of(url: str) -> str:
    host, slash, path = url[len("file://") :].partition("/")
    if url[4:7] != "://" or not slash or host.lower() not in ("", "localhost"):
        raise ImageForbidden(
            f"the URL {shown(url)} does not name a file of this server; write file:///path/to/image"
        )
    return "/" + unquote(path)
