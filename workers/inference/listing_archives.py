"""The images of a tar or zip archive: one entry per member that is an image or would hold some.

Nothing is unpacked. Members that lead out of the archive, are links, archives themselves, encrypted
or too large are entries that say so; what is no image by its name is passed over, or is the text
beside one.
"""

from __future__ import annotations

import os
import posixpath
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from shared.captions import Entry, Place, escape_name, unescape_name
from shared.errors import EntryRefused, ImageSetUnreadable, ImageTooLarge, StorageFailed, VlmqError
from shared.storage import storage_errors
from workers.inference.archive_names import plain_name, split_key
from workers.inference.image_files import shown
from workers.inference.listing_base import Found, Surroundings, is_archive_name, is_image_name
from workers.inference.tar_members import TarMember, read_tar
from workers.inference.zip_members import (
    DEFLATED,
    STORED,
    Directory,
    ZipMember,
    find_directory,
    read_directory,
)

_BUFFER_BYTES = 1 << 16
_MAX_GROUP = 64
"""Members of one key that are looked at together; more begin another group."""
_TICK_EVERY = 1024


@contextmanager
def opened(place: Place, around: Surroundings) -> Iterator[BinaryIO]:
    """The archive or list at ``place``. Raises: ImageError; StorageFailed."""
    if place.file is not None:
        path = around.open_upload(place.file)
        with storage_errors(path), open(path, "rb", buffering=_BUFFER_BYTES) as stream:
            yield stream
        return
    path = Path(unescape_name(place.path or ""))
    with (
        around.roots.opened(str(path)) as descriptor,
        storage_errors(path),
        os.fdopen(descriptor, "rb", buffering=_BUFFER_BYTES, closefd=False) as stream,
    ):
        yield stream


def list_tar(place: Place, after: object, around: Surroundings) -> Iterator[Found]:
    """The images of a tar, with the texts that lie next to them under the same key.

    A cursor is the header of a group of members of one key, and how many images of it are listed.
    """
    start, done = (0, 0) if after is None else _pair(after)
    kinds = {column.partition(".")[0] for column in around.columns}
    with opened(place, around) as stream:
        end = os.fstat(stream.fileno()).st_size
        at = start
        try:
            for group in _groups(read_tar(stream, start, end), around):
                at = group[-1].following
                yield from _of_group(group, place, kinds, done, around)
                done = 0
        except ImageSetUnreadable as error:
            yield _broken(error, place, [end, 0], at)


def _groups(members: Iterator[TarMember], around: Surroundings) -> Iterator[list[TarMember]]:
    group: list[TarMember] = []
    key: str | None = None
    damage: ImageSetUnreadable | None = None
    try:
        for count, member in enumerate(members):
            if count % _TICK_EVERY == 0:
                around.keep_going()
            of = split_key(member.name)[0]
            if group and (of != key or len(group) >= _MAX_GROUP):
                yield group
                group = []
            key = of
            group.append(member)
    except ImageSetUnreadable as error:
        damage = error
    if group:
        yield group
    if damage is not None:
        raise damage


def _of_group(
    group: list[TarMember], place: Place, kinds: set[str], done: int, around: Surroundings
) -> Iterator[Found]:
    texts = {member.name: member for member in group if member.kind == "file"} if kinds else {}
    listed = [member for member in group if member.kind != "folder" and _is_listed(member.name)]
    for number, member in enumerate(listed[done:], done + 1):
        is_last = number == len(listed)
        cursor = [group[-1].following, 0] if is_last else [group[0].header, number]
        yield Found(_tar_entry(member, place, kinds, texts, around), place, cursor)


def _tar_entry(
    member: TarMember,
    place: Place,
    kinds: set[str],
    texts: dict[str, TarMember],
    around: Surroundings,
) -> Entry:
    try:
        name = _checked(member.name, member.size, around)
        if member.kind != "file":
            what = "a link" if member.kind == "link" else "no plain file"
            raise EntryRefused(f"{shown(member.name)} is {what} in the archive")
    except VlmqError as error:
        return _refused(member.name, error, place)
    sidecars = {
        kind: [texts[name].offset, texts[name].size]
        for kind in kinds
        for name in _beside(member.name, kind)
        if name in texts
    }
    return Entry(
        place.prefix + escape_name(name),
        offset=member.offset,
        size=member.size,
        sidecars=sidecars or None,
    )


def list_zip(place: Place, after: object, around: Surroundings) -> Iterator[Found]:
    """The images of a zip; texts may lie anywhere in it. A cursor is a position in its directory.

    Raises: ImageSetUnreadable if it has none.
    """
    start = None if after is None else int(str(after))
    kinds = {column.partition(".")[0] for column in around.columns}
    with opened(place, around) as stream, closing(_Texts(around.scratch)) as texts:
        directory = find_directory(stream)
        at = directory.start if start is None else start
        try:
            if kinds:
                texts.fill(_members(stream, directory, None, around), kinds)
            for member in _members(stream, directory, start, around):
                at = member.following
                if not member.is_folder and _is_listed(member.name):
                    entry = _zip_entry(member, place, kinds, texts, around)
                    yield Found(entry, place, member.following)
        except ImageSetUnreadable as error:
            yield _broken(error, place, directory.end, at)


def _members(
    stream: BinaryIO, directory: Directory, start: int | None, around: Surroundings
) -> Iterator[ZipMember]:
    for count, member in enumerate(read_directory(stream, directory, start)):
        if count % _TICK_EVERY == 0:
            around.keep_going()
        yield member


def _zip_entry(
    member: ZipMember, place: Place, kinds: set[str], texts: _Texts, around: Surroundings
) -> Entry:
    try:
        name = _checked(member.name, max(member.size, member.stored), around)
        _require_plain(member)
    except VlmqError as error:
        return _refused(member.name, error, place)
    sidecars = {kind: found for kind in kinds if (found := texts.find(member.name, kind))}
    return Entry(
        place.prefix + escape_name(name),
        offset=member.offset,
        size=member.size,
        stored=member.stored,
        sidecars=sidecars or None,
    )


def _require_plain(member: ZipMember) -> None:
    """Raise EntryRefused unless the member is a file whose bytes can be had."""
    if member.is_link or member.is_other:
        what = "a link" if member.is_link else "no plain file"
        raise EntryRefused(f"{shown(member.name)} is {what} in the archive")
    if member.is_outside:
        raise EntryRefused(f"{shown(member.name)} lies outside of the archive")
    if member.is_encrypted:
        raise EntryRefused(f"{shown(member.name)} is encrypted; pack it without a password")
    if member.method not in {STORED, DEFLATED}:
        raise EntryRefused(
            f"{shown(member.name)} is packed by method {member.method}; only plain ('deflate') and "
            "unpacked members can be read"
        )


class _Texts:
    """Where the texts of a zip are, by name, in a scratch database."""

    def __init__(self, scratch: Path) -> None:
        self._path = scratch / f"texts-{os.urandom(8).hex()}"
        self._base: sqlite3.Connection | None = None

    def fill(self, members: Iterator[ZipMember], kinds: set[str]) -> None:
        with _scratch_errors(self._path):
            self._base = sqlite3.connect(self._path)
            self._base.execute("pragma journal_mode = off")
            self._base.execute("pragma synchronous = off")
            self._base.execute(
                "create table texts (name text primary key, at integer, size integer, "
                "stored integer) without rowid"
            )
            self._base.executemany(
                "insert or replace into texts values (?, ?, ?, ?)",
                (
                    (member.name, member.offset, member.size, member.stored)
                    for member in members
                    if self._is_wanted(member, kinds)
                ),
            )

    def find(self, image: str, kind: str) -> list[int] | None:
        assert self._base is not None, "nothing was filled in"
        for name in _beside(image, kind):
            with _scratch_errors(self._path):
                row = self._base.execute(
                    "select at, size, stored from texts where name = ?", (name,)
                ).fetchone()
            if row is not None:
                return list(row)
        return None

    def close(self) -> None:
        if self._base is not None:
            self._base.close()

    def _is_wanted(self, member: ZipMember, kinds: set[str]) -> bool:
        kind = member.name.rpartition(".")[2]
        if kind not in kinds and split_key(member.name)[1] not in kinds:
            return False
        try:
            _require_plain(member)
        except EntryRefused:
            return False  # then it is as if it were not there, and entries say so
        return not member.is_folder


@contextmanager
def _scratch_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(f"{path}: {error}") from error


def _is_listed(name: str) -> bool:
    """Whether a member is an image, or would hold images, by its name."""
    if not is_image_name(name) and not is_archive_name(name):
        return False
    if "/." not in name and not name.startswith("."):
        return True
    return not any(part.startswith(".") and part.strip(".") for part in name.split("/"))


def _checked(name: str, size: int, around: Surroundings) -> str:
    """The member's name as it is listed. Raises: EntryRefused, ImageTooLarge."""
    plain = plain_name(name)
    if is_archive_name(plain):
        raise EntryRefused(f"{shown(name)} is an archive in an archive; list it on its own")
    if size > around.max_image_bytes:
        raise ImageTooLarge(
            f"{shown(name)} has more than the {around.max_image_bytes:,} bytes this server accepts "
            "for an image"
        )
    return plain


def _refused(name: str, error: VlmqError, place: Place) -> Entry:
    refused = (error.code, error.message)
    return Entry(place.prefix + escape_name(name), refused=refused)


def _beside(image: str, kind: str) -> tuple[str, str]:
    """Where the text of this kind may lie: under the image's own name, or under its key."""
    return f"{posixpath.splitext(image)[0]}.{kind}", f"{split_key(image)[0]}.{kind}"


def _broken(error: ImageSetUnreadable, place: Place, cursor: object, at: int) -> Found:
    """The entry that stands for what cannot be listed of an archive."""
    name = place.prefix.removesuffix("/") or posixpath.basename(place.path or place.file or "")
    refused = (error.code, error.message)
    return Found(Entry(f"{name} (from byte {at})", refused=refused), place, cursor)


def _pair(after: object) -> tuple[int, int]:
    assert isinstance(after, list), "no cursor of a tar"
    return int(after[0]), int(after[1])
