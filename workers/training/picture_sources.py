"""Get every image that rows name, from wherever it may be, and store it verified.

Four kinds of places: an archive that rows name members of, a folder below an image root that they
name files of, addresses that stand for themselves (``data:`` and http(s) URLs, uploads, paths), and
whatever the source of a row reads itself.
Images are decoded by several threads; what becomes of them is noted by the one that calls.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

from shared.errors import ImageError, ImageForbidden, ImageNotFound
from shared.ids import is_id
from shared.process import usable_cores
from shared.settings import ImageSettings
from workers.inference.image_files import ImageRoots, shown
from workers.training.data_report import EntryTally
from workers.training.picture_archive import Entry, plain_name, read_entries
from workers.training.pictures import Picture, PictureFolder
from workers.training.row_table import RowTable

LoadImage = Callable[[str], bytes]
"""From an address that stands for itself to an encoded file; raises ImageError."""

_MAX_THREADS = 8
_DATA = "data:"


class PictureCollector:
    """Fills the folder of images, and notes in the table what became of each address."""

    def __init__(
        self,
        table: RowTable,
        pictures: PictureFolder,
        settings: ImageSettings,
        load: LoadImage,
        keep_going: Callable[[], None],
    ) -> None:
        self._table = table
        self._pictures = pictures
        self._settings = settings
        self._load = load
        self._keep_going = keep_going
        self._example = ""
        """The name of some member of the archive."""
        self._threads = min(usable_cores(), _MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, "pictures")
        self._waiting: deque[tuple[str, Future[Picture]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take_inline(self, url: str) -> str:
        """Begin to store the image in a ``data:`` URL; the short address it is known by."""
        address = _DATA + hashlib.sha256(url.encode()).hexdigest()
        self.take(address, lambda: self._load(url))
        return address

    def take(self, address: str, load: Callable[[], bytes]) -> None:
        """Begin to store an image that nothing but ``load`` can get; it may raise ImageError.

        ``load`` is called by another thread.
        """
        if not self._table.knows_image(address):
            self._table.name_image(address)
            self._submit(address, lambda: self._pictures.store(load()))

    def finish(self) -> None:
        """Wait for the images that were begun."""
        while self._waiting:
            self._note_oldest()

    def take_all(self, archive: Path | None, folder: Path | None, refused: EntryTally) -> None:
        """Get all images that rows name and that are not known yet."""
        self.finish()
        if archive is not None:
            self._take_archive(archive, refused)
        root = None if folder is None else ImageRoots((folder,), self._settings.max_bytes)
        for address in self._table.wanted_images():
            self._keep_going()
            if root is None or stands_alone(address):
                self._submit(address, self._reader(address, has_archive=archive is not None))
            else:
                self._submit(address, self._file_reader(root, f"{folder}/{address}"))
        self.finish()

    def _reader(self, address: str, *, has_archive: bool) -> Callable[[], Picture]:
        if stands_alone(address):
            return lambda: self._pictures.store(self._load(address))
        if has_archive:
            like = f"; its files are named like {shown(self._example)}" if self._example else ""
            return _refusal(ImageNotFound(f"the archive holds no file {shown(address)}{like}"))
        return _refusal(
            ImageNotFound(
                f"the row names a file, {shown(address)}; say in 'images' where it is: an uploaded "
                "archive, or a folder that this server reads images from"
            )
        )

    def _file_reader(self, root: ImageRoots, path: str) -> Callable[[], Picture]:
        return lambda: self._pictures.store(root.read(path))

    def _take_archive(self, archive: Path, refused: EntryTally) -> None:
        entries = read_entries(
            archive,
            self._wants,
            max_bytes=self._settings.max_bytes,
            refused=refused,
            keep_going=self._keep_going,
        )
        for entry, result in self._stored(entries):
            for address in self._matches(entry.name):
                self._note_match(address, result, exact=address == entry.name)

    def _stored(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Picture | ImageError]]:
        """Each entry with what became of it, in their order, a few at a time in memory."""
        waiting: deque[tuple[Entry, Future[Picture]]] = deque()
        for entry in entries:
            store = (
                _refusal(entry.content)
                if isinstance(entry.content, ImageError)
                else partial(self._pictures.store, entry.content)
            )
            waiting.append((Entry(entry.name, b""), self._pool.submit(store)))
            if len(waiting) > self._threads:
                first, future = waiting.popleft()
                yield first, _outcome(future)
        for entry, future in waiting:
            yield entry, _outcome(future)

    def _wants(self, name: str) -> bool:
        self._example = name
        return any(self._matches(name))

    def _matches(self, name: str) -> Iterator[str]:
        """The addresses in rows that a member may be meant by: its name or an end of it."""
        parts = name.split("/")
        for index in range(len(parts)):
            address = "/".join(parts[index:])
            if self._table.knows_image(address):
                yield address

    def _note_match(self, address: str, result: Picture | ImageError, *, exact: bool) -> None:
        before = self._table.fate(address)
        if before is not None and before.exact and not exact:
            return
        if before is not None and before.exact == exact:
            if isinstance(result, Picture) and result.name == before.name:
                return
            message = f"the archive holds several files that {shown(address)} may mean"
            self._table.missed(address, "image_ambiguous", message, exact=exact)
            return
        self._note(address, result, exact=exact)

    def _submit(self, address: str, store: Callable[[], Picture]) -> None:
        self._waiting.append((address, self._pool.submit(store)))
        if len(self._waiting) > self._threads:
            self._note_oldest()

    def _note_oldest(self) -> None:
        self._keep_going()
        address, future = self._waiting.popleft()
        self._note(address, _outcome(future))

    def _note(self, address: str, result: Picture | ImageError, *, exact: bool = True) -> None:
        if isinstance(result, Picture):
            self._table.found(address, result, exact=exact)
        else:
            self._table.missed(address, result.code, result.message, exact=exact)


def stands_alone(address: str) -> bool:
    """Whether an address means the same wherever the other images are."""
    scheme, colon, _ = address[:8].partition(":")
    return (
        address.startswith("/")
        or is_id(address, "file-")
        or (bool(colon) and scheme.lower() in {"data", "http", "https", "file"})
    )


def relative_address(address: str) -> str:
    """The name of a member as rows may spell it. Raises: ImageForbidden."""
    try:
        return plain_name(address)
    except ValueError as error:
        raise ImageForbidden(f"{shown(address)} cannot be the name of an image ({error})") from None


def _outcome(future: Future[Picture]) -> Picture | ImageError:
    try:
        return future.result()
    except ImageError as error:
        return error


def _refusal(error: ImageError) -> Callable[[], Picture]:
    def refuse() -> Picture:
        raise error

    return refuse
