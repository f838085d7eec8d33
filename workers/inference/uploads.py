"""Uploaded files as images: an owner's own only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.errors import ImageNotFound, NotFound
from shared.settings import ImageSettings
from shared.stores import Stores
from workers.inference.engines.base import Detail, Image, Tiling
from workers.inference.image_sources import ImageReader, OpenUpload
from workers.inference.prompts import ReadImage


class OwnedImages:
    """Reads images for each owner, with what is shared between owners shared."""

    def __init__(self, settings: ImageSettings, stores: Stores) -> None:
        self._stores = stores
        self._images = ImageReader(settings, _no_uploads)

    def reader(self, owner: str, tiling: Callable[[], Tiling | None] = lambda: None) -> ReadImage:
        """Reads the images that ``owner`` may see, cut as ``tiling`` says at the time.

        Raises, when called: ImageError.
        """
        images = self._images.with_uploads(upload_opener(self._stores, owner))
        return lambda url, detail: images.read(url, detail, tiling())

    def preparer(
        self, tiling: Callable[[], Tiling | None] = lambda: None
    ) -> Callable[[bytes, Detail], Image]:
        """Verifies encoded images, and cuts them as ``tiling`` says at the time.

        Raises, when called: ImageError.
        """
        return lambda data, detail: self._images.prepare(data, detail, tiling())

    def load_url(self, url: str) -> bytes:
        """The encoded image at an http(s) URL, not yet looked at. Raises: ImageError."""
        return self._images.load(url)

    def close(self) -> None:
        """Close idle connections to image servers."""
        self._images.close()


def upload_opener(stores: Stores, owner: str) -> OpenUpload:
    """Finds the uploads of ``owner``. Raises, when called: ImageNotFound."""

    def open_upload(file_id: str) -> Path:
        try:
            return stores.files.content_path(owner, file_id)
        except NotFound:
            return _no_uploads(file_id)

    return open_upload


def _no_uploads(file_id: str) -> Path:
    raise ImageNotFound(f"there is no file '{file_id}'")
