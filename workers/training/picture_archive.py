"""The images of an uploaded archive (tar, tar.gz or zip), one after the other.

Nothing is unpacked under the names that an archive gives: members are only read, and only those
that rows ask for. Whatever is not a plain file with a plain name is refused, each with its reason.
How much is read is bounded by the archive's own size and by the limit of one image.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from shared.errors import ArchiveInvalid, ImageError, ImageTooLarge, ImageUnreadable
from shared.storage import storage_errors
from workers.inference.image_files import shown
from workers.training.data_report import EntryTally

_MIB = 1024 * 1024
_PIECE_BYTES = _MIB
MAX_EXPANSION = 200
"""How many times its own size a compressed tar may grow to; photographs hardly grow at all."""
_MAX_TAR_READ = 16 * _MIB
"""More than any header has; a longer one would be read into memory whole."""
_MAX_ZIP_READ = 128 * _MIB
"""The largest directory of a zip file, room for about a million images."""
_MAX_NAME = 4096
_MAX_FOLDERS = 64
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    RecursionError,
    OverflowError,
    ValueError,
    NotImplementedError,
    MemoryError,
)
"""What the standard library raises for archives that are not what they say."""


class Entry(NamedTuple):
    """A member that rows ask for: its bytes, or why they cannot be had."""

    name: str
    content: bytes | ImageError


def plain_name(name: str) -> str:
    """A relative name as names are compared: one kind of slash, one form of Unicode.

    Raises: ValueError saying why it names nothing inside a folder.
    """
    plain = unicodedata.normalize("NFC", name.replace("\\", "/"))
    parts = [part for part in plain.split("/") if part not in {"", "."}]
    if plain.startswith("/") or plain[1:3] == ":/":
        raise ValueError("absolute_path")
    if ".." in parts:
        raise ValueError("parent_path")
    if not parts or "\0" in plain or len(plain) > _MAX_NAME or len(parts) > _MAX_FOLDERS:
        raise ValueError("invalid_name")
    return "/".join(parts)


def read_entries(
    path: Path,
    wanted: Callable[[str], bool],
    *,
    max_bytes: int,
    refused: EntryTally,
    keep_going: Callable[[], None],
) -> Iterator[Entry]:
    """The members whose plain name is ``wanted``, in the order of the archive.

    Raises: ArchiveInvalid, StorageFailed.
    """
    with storage_errors(path), open(path, "rb") as stream, _broken_is_invalid():
        start = stream.read(512)
        stream.seek(0)
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield from _zip_entries(stream, wanted, max_bytes, refused, keep_going)
        elif start.startswith(b"\x1f\x8b"):
            limit = max(64 * _MIB, MAX_EXPANSION * path.stat().st_size)
            with gzip.GzipFile(fileobj=stream) as unpacked:
                yield from _tar_entries(unpacked, limit, wanted, max_bytes, refused, keep_going)
        elif start[257:262] == b"ustar" or _has_tar_checksum(start):
            limit = path.stat().st_size + _MIB
            yield from _tar_entries(stream, limit, wanted, max_bytes, refused, keep_going)
        else:
            raise ArchiveInvalid(
                "the file is no tar, tar.gz or zip archive; pack the images as one of these",
                param="images",
            )


@contextmanager
def _broken_is_invalid() -> Iterator[None]:
    try:
        yield
    except ArchiveInvalid:
        raise
    except _BROKEN as error:
        raise ArchiveInvalid(
            f"the archive is damaged or was not uploaded in full ({error}); upload it again",
            param="images",
        ) from error


class _Bounded:
    """A file whose reads are bounded, each and by where they end; ``last`` is what was read last."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, max_read: int, limit: int) -> None:
        self._stream = stream
        self._max_read = max_read
        self._limit = limit
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, self._limit - self._stream.tell())
        if size > self._max_read:
            raise ArchiveInvalid("the archive has a header of absurd size", param="images")
        self._require_within(self._stream.tell() + size, slack=_MAX_TAR_READ)
        self.last = self._stream.read(size)
        return self.last

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._require_within(offset)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def _require_within(self, offset: int, slack: int = 0) -> None:
        if offset > self._limit + slack:
            raise ArchiveInvalid(
                f"the archive unpacks to more than {self._limit >> 20:,} MiB, or says so without "
                "holding as much; pack the images anew, as plain tar",
                param="images",
            )


# --- tar --------------------------------------------------------------------------------------


def _tar_entries(
    stream: BinaryIO | gzip.GzipFile,
    limit: int,
    wanted: Callable[[str], bool],
    max_bytes: int,
    refused: EntryTally,
    keep_going: Callable[[], None],
) -> Iterator[Entry]:
    source: Any = _Bounded(stream, _MAX_TAR_READ, limit)
    with tarfile.open(fileobj=source, mode="r:") as archive:
        while (member := archive.next()) is not None:
            keep_going()
            # Else every member that was seen stays in memory.
            archive.members = []  # type: ignore[attr-defined]
            name = _tar_name(member, refused)
            if name is not None and wanted(name):
                yield Entry(name, _tar_content(archive, member, max_bytes))
        # tarfile takes any header that makes no sense for the end.
        if source.last.strip(b"\0"):
            raise ArchiveInvalid(
                "the archive is damaged: what follows its first members is no archive; upload it "
                "again",
                param="images",
            )


def _tar_name(member: tarfile.TarInfo, refused: EntryTally) -> str | None:
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        refused.refuse(shown(member.name), "link")
        return None
    if not member.isreg() or member.issparse():
        refused.refuse(shown(member.name), "not_a_file")
        return None
    try:
        # Bytes that were no UTF-8 stand in the name as lone surrogates.
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        name = _from_gbk(member.name.encode("utf-8", "surrogateescape")) or "\0"
    return _checked_name(name, refused)


def _tar_content(
    archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int
) -> bytes | ImageError:
    if member.size > max_bytes:
        return _too_large(member.name, max_bytes)
    stream = archive.extractfile(member)
    assert stream is not None
    return _read_at_most(stream, max_bytes) or b""


def _has_tar_checksum(start: bytes) -> bool:
    """Whether it begins like a tar of the old kind, which has no signature."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


# --- zip --------------------------------------------------------------------------------------


def _zip_entries(
    stream: BinaryIO,
    wanted: Callable[[str], bool],
    max_bytes: int,
    refused: EntryTally,
    keep_going: Callable[[], None],
) -> Iterator[Entry]:
    stream.seek(0, io.SEEK_END)
    source: Any = _Bounded(stream, _MAX_ZIP_READ, stream.tell())
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            keep_going()
            name = _zip_name(member, refused)
            if name is not None and wanted(name):
                yield Entry(name, _zip_content(archive, member, max_bytes))


def _zip_name(member: zipfile.ZipInfo, refused: EntryTally) -> str | None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir() or kind == stat.S_IFDIR:
        return None
    reason = None
    if kind == stat.S_IFLNK:
        reason = "link"
    elif kind not in {0, stat.S_IFREG}:
        reason = "not_a_file"
    elif member.flag_bits & 1:
        reason = "encrypted"
    elif member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        reason = "unknown_compression"
    if reason is not None:
        refused.refuse(shown(member.filename), reason)
        return None
    return _checked_name(_zip_text(member), refused)


def _zip_text(member: zipfile.ZipInfo) -> str:
    """The name, which many programs write in the encoding of their country without saying so."""
    name = member.filename
    if member.flag_bits & 0x800 or name.isascii():
        return name
    raw = name.encode("cp437")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return _from_gbk(raw) or name


def _zip_content(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int
) -> bytes | ImageError:
    if member.file_size > max_bytes:
        return _too_large(member.filename, max_bytes)
    try:
        with archive.open(member) as stream:
            content = _read_at_most(stream, max_bytes)
    except _BROKEN as error:
        return ImageUnreadable(f"{shown(member.filename)} is damaged in the archive: {error}")
    return _too_large(member.filename, max_bytes) if content is None else content


# --- both -------------------------------------------------------------------------------------


def _checked_name(name: str, refused: EntryTally) -> str | None:
    try:
        return plain_name(name)
    except ValueError as error:
        refused.refuse(shown(name), str(error))
        return None


def _from_gbk(raw: bytes) -> str | None:
    try:
        return raw.decode("gb18030")
    except UnicodeDecodeError:
        return None


def _read_at_most(stream: IO[bytes], most: int) -> bytes | None:
    """All of it, or ``None`` if that is more."""
    content = bytearray()
    while piece := stream.read(min(_PIECE_BYTES, most + 1 - len(content))):
        content += piece
        if len(content) > most:
            return None
    return bytes(content)


def _too_large(name: str, max_bytes: int) -> ImageError:
    return ImageTooLarge(
        f"{shown(name)} has more than the {max_bytes:,} bytes this server accepts for an image"
    )
