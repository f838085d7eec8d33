"""Images inside the archives and tables of an image set, read by offset on this machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from cli.client import Client, ServerTrouble
from cli.export.writing import LeftOut
from cli.output import note
from shared.captions import Place, unescape_name
from shared.errors import ConfigurationError, ImageError, ImageSetUnreadable
from shared.result_rows import Member
from shared.tables import TableRows, image_in
from shared.zip_reading import read_member


class Archives:
    """Reads members of archives: of ``given`` if that is a file, or where the server has them.

    Uploads are downloaded once, into a temporary file. One archive is open at a time.
    """

    def __init__(self, client: Client, given: Path | None) -> None:
        self._client = client
        self._given = given
        self._place: Place | None = None
        self._stream: BinaryIO | None = None
        self._rows: TableRows | None = None

    def close(self) -> None:
        """Let go of the open archive."""
        self._rows = None
        if self._stream is not None:
            self._stream.close()
        self._place = self._stream = None

    def read(self, member: Member, name: str) -> bytes:
        """The encoded image. Raises: LeftOut."""
        stream = self._opened(member.place)
        try:
            data = self._bytes(member, stream.fileno(), name)
        except (ImageError, ImageSetUnreadable, ConfigurationError) as error:
            raise LeftOut(error.code, error.message) from None
        except OSError as error:
            raise LeftOut("image_unreadable", f"cannot read {name!a}: {error.strerror}") from None
        if member.size is not None and len(data) != member.size:
            raise LeftOut("image_truncated", f"the archive ends in the middle of {name!a}")
        return data

    def _bytes(self, member: Member, descriptor: int, name: str) -> bytes:
        place, offset, size = member.place, member.offset, member.size or 0
        if place.type == "zip":
            return read_member(descriptor, offset, member.stored or 0, size, ascii(name))
        if place.type == "tar":
            return os.pread(descriptor, size, offset)
        if self._rows is None or not self._rows.is_of(place, offset):
            self._rows = TableRows(place, descriptor, offset)
        image = image_in(self._rows.cell(offset), ascii(name))
        if isinstance(image, str):
            raise LeftOut("image_not_found", f"the row of {name!a} holds a path and no image")
        return image

    def _opened(self, place: Place) -> BinaryIO:
        if self._stream is None or self._place != place:
            self.close()
            self._stream, self._place = self._open(place), place
        return self._stream

    def _open(self, place: Place) -> BinaryIO:
        if self._given is None and place.file is not None:
            return self._downloaded(place.file)
        path = self._given or Path(unescape_name(place.path or ""))
        try:
            stream = open(path, "rb")  # noqa: SIM115 - open until another archive is
        except OSError as error:
            raise LeftOut(
                "image_not_found",
                f"cannot read {str(path)!a}: {error.strerror}; say with --images where the archive "
                "is on this machine",
            ) from None
        if place.size is not None and os.fstat(stream.fileno()).st_size != place.size:
            stream.close()
            raise LeftOut(
                "image_changed", f"{str(path)!a} is not the file that it was when it was listed"
            )
        return stream

    def _downloaded(self, file_id: str) -> BinaryIO:
        note(f"downloading {file_id}, which holds the images")
        stream = tempfile.TemporaryFile()  # noqa: SIM115 - open until another archive is
        try:
            for block in self._client.download(file_id):
                stream.write(block)
            stream.flush()
        except ServerTrouble as error:
            stream.close()
            if error.status != 404:
                raise
            raise LeftOut("image_not_found", f"the file '{file_id}' was deleted") from None
        except BaseException:
            stream.close()
            raise
        return stream
