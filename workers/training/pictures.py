"""Images as the trainer reads them: verified to the last pixel, upright, once each by content.

xtuner replaces an image that it cannot open by that of another row without a word, and does not
look at an image's orientation; so nothing is stored that has not been decoded here in full.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from shared.errors import ImageTooLarge
from shared.settings import ImageSettings
from shared.storage import storage_errors
from workers.inference.images import DecodeRoom, upright_file

TRAINER_MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)
"""Pillow, as the trainer uses it, opens no image with more, whatever this server accepts."""

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}


class Picture(msgspec.Struct, frozen=True):
    """A stored image: its path below the folder of images, its size in pixels, its file's bytes.

    The path follows from the digest of the bytes that it was made from.
    """

    name: str
    width: int
    height: int
    bytes: int


class PictureFolder:
    """Stores images. Serves several threads."""

    def __init__(self, folder: Path, settings: ImageSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._room = DecodeRoom(settings.max_pixels)

    def store(self, data: bytes) -> Picture:
        """Verify an encoded file and keep it.

        Raises: a subclass of ImageError that says what is wrong; StorageFull, StorageFailed.
        """
        found = upright_file(data, self._settings, self._room)
        if found.width * found.height > TRAINER_MAX_PIXELS:
            raise ImageTooLarge(
                f"the image has more than the {TRAINER_MAX_PIXELS:,} pixels that training reads; "
                "scale it down"
            )
        digest = hashlib.sha256(data).hexdigest()
        name = f"{digest[:2]}/{digest}{_SUFFIXES.get(found.format, '.tif')}"
        self._write(self._folder / name, found.data)
        return Picture(name, found.width, found.height, len(found.data))

    def keep_only(self, is_used: Callable[[str], bool]) -> int:
        """Delete the stored images that are not used, by name; how many are left.

        Raises: StorageFailed.
        """
        left = 0
        with storage_errors(self._folder):
            for folder in list(os.scandir(self._folder)):
                for file in list(os.scandir(folder)):
                    if is_used(f"{folder.name}/{file.name}"):
                        left += 1
                    else:
                        os.unlink(file)
        return left

    def _write(self, path: Path, data: bytes) -> None:
        """Not synced: whoever makes the whole folder appear syncs all of it at once."""
        with storage_errors(path):
            if path.exists():
                return
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as stream:
                stream.write(data)
