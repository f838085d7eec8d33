"""Uploaded files as images: an owner's own only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.errors import ImageNotFound, NotFound
from shared.settings import ImageSettings
from shared.stores import Stores
from workers.inference.engines.base import Tiling
from workers.inference.image_sources import ImageReader
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

        def open_upload(file_id: str) -> Path:
            try:
                return self._stores.files.content_path(owner, file_id)
            except NotFound:
                return _no_uploads(file_id)

        images = self._images.with_uploads(open_upload)
        return lambda url, detail: images.read(url, detail, tiling())

    def close(self) -> None:
        """Close idle connections to image servers."""
        self._images.close()


def _no_uploads(file_id: str) -> Path:
    raise ImageNotFound(f"there is no file '{file_id}'")
