"""Whether a caption job may have what it names: model, folders, archives, uploads.

Whatever is wrong is said before the job exists. The worker checks again, for all of it may change.
"""

from __future__ import annotations

import os
import posixpath

from api import current
from shared.captions import CaptionSource, ImagePlace
from shared.errors import InvalidValue, NotFound

UPLOAD_PURPOSES = ("vision", "user_data")
_MAGIC = frozenset("*?[")


def check_source(source: CaptionSource) -> None:
    """Raises: ModelNotFound or InvalidValue whose ``param`` is the field."""
    current.visible_model(source.model)
    for index, place in enumerate(source.images):
        param = "images" if len(source.images) == 1 else f"images[{index}]"
        if (place.path is None) == (place.file is None):
            raise InvalidValue(
                f"{param}: give either 'path', a path of the server, or 'file', an upload's id",
                param=param,
            )
        if place.file is not None:
            _check_upload(place.file, param)
        else:
            _check_path(place, param)


def _check_upload(file_id: str, param: str) -> None:
    try:
        record = current.stores().files.get(current.owner(), file_id)
    except NotFound as error:
        raise InvalidValue(f"{param}: {error.message}", param=param) from None
    if record.purpose not in UPLOAD_PURPOSES:
        raise InvalidValue(
            f"{param}: the file '{file_id}' was uploaded for '{record.purpose}'; upload it for "
            f"'{UPLOAD_PURPOSES[0]}'",
            param=param,
        )


def _check_path(place: ImagePlace, param: str) -> None:
    path = place.path or ""
    roots = current.stores().settings.images.roots
    if not roots:
        raise InvalidValue(
            f"{param}: this server reads no images from its disk; upload an archive (tar or zip) to "
            "/v1/files and name it, or let the operator name folders in the setting images.roots",
            param=param,
        )
    if "\0" in path or not path.startswith("/") or ".." in path.split("/"):
        raise InvalidValue(
            f"{param}: name an upload (file-…), or a path of the server, absolute and without '..'",
            param=param,
        )
    if not os.path.lexists(path) or place.type == "glob":
        path = _before_pattern(path)
    real = os.path.realpath(path)
    # The same answer whether or not something is there: outside is nobody's business.
    if not any(_is_inside(real, os.path.realpath(root)) for root in roots):
        raise InvalidValue(
            f"{param}: that is not inside a folder this server may read images from (the setting "
            "images.roots); upload an archive to /v1/files instead",
            param=param,
        )
    if not os.path.exists(real):  # noqa: PTH110 - says no where Path.exists fails, for long names
        raise InvalidValue(f"{param}: there is no such file or folder", param=param)


def _before_pattern(path: str) -> str:
    """The folder in front of the first segment of a pattern; the path itself if it is none."""
    segments = path.split("/")
    for index, segment in enumerate(segments):
        if _MAGIC & set(segment):
            return "/".join(segments[:index]) or "/"
    return path


def _is_inside(real: str, root: str) -> bool:
    return posixpath.commonpath([real, root]) == root
