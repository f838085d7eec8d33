"""The images below a folder, or those that a pattern names, in the order of their names.

Folders are opened relative to the one that holds them and never through links, so nothing that is
renamed meanwhile leads out of the image roots, and no link leads around in circles. Links to files
are listed; whether they may be read is decided when they are.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from shared.captions import Entry, Place, escape_name, unescape_name
from shared.errors import EntryRefused, ImageForbidden, ImageNotFound, StorageFailed
from shared.storage import storage_errors
from workers.inference.image_files import MISSING, REFUSED, shown
from workers.inference.listing_base import Found, Surroundings, is_image_name, is_set_name
from workers.inference.sorted_names import sorted_names

MAX_DEPTH = 200
_FOLDER, _FILE, _LINK = "d", "f", "l"
_MAGIC = re.compile(r"[*?\[]")
_ANY_DEPTH = "**"
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Pattern:
    """Which paths below a folder are meant: segments with ``* ? [ ]``, or ``**`` for any depth.

    A path is followed segment by segment: a state is a set of positions in the pattern. What is inside
    a folder that the whole pattern names is meant, too.
    """

    def __init__(self, segments: Sequence[str]) -> None:
        self._segments = tuple(segments)
        self._names = [re.compile(fnmatch.translate(segment)).match for segment in segments]
        self._end = len(self._segments)
        self.start = self._closed({0})

    def step(self, state: frozenset[int], name: str) -> frozenset[int]:
        """The state behind a name; empty if nothing there is meant."""
        following: set[int] = set()
        for position in state:
            if position == self._end or self._segments[position] == _ANY_DEPTH:
                if not name.startswith("."):
                    following.add(position)
            elif self._names[position](name) and self._shows(position, name):
                following.add(position + 1)
        return self._closed(following)

    def names(self, state: frozenset[int]) -> bool:
        """Whether a path with this state is meant itself."""
        return self._end in state

    def _shows(self, position: int, name: str) -> bool:
        return not name.startswith(".") or self._segments[position].startswith(".")

    def _closed(self, state: set[int]) -> frozenset[int]:
        for position in sorted(state):
            at = position
            while at < self._end and self._segments[at] == _ANY_DEPTH:
                at += 1
                state.add(at)
        return frozenset(state)


EVERYTHING = Pattern([_ANY_DEPTH])


def is_pattern(path: str) -> bool:
    """Whether a path holds ``*``, ``?`` or ``[``."""
    return _MAGIC.search(path) is not None


def split_pattern(path: str) -> tuple[str, Pattern]:
    """The folder in front of the first ``*``, ``?`` or ``[``, and the pattern below it."""
    segments = path.split("/")
    fixed = next(index for index, segment in enumerate(segments) if is_pattern(segment))
    return "/".join(segments[:fixed]) or "/", Pattern([part for part in segments[fixed:] if part])


class FoundFile(NamedTuple):
    """A file below the folder: its path in it, and what was seen of it. ``refused`` is why not."""

    path: str
    size: int | None = None
    mtime_ns: int | None = None
    refused: EntryRefused | ImageForbidden | ImageNotFound | None = None


class _Level(NamedTuple):
    descriptor: int
    prefix: str
    state: frozenset[int]
    names: Iterator[tuple[str, str]]
    skipping: bool


def list_folder(
    place: Place, path: str, after: str | None, around: Surroundings, pattern: Pattern = EVERYTHING
) -> Iterator[Found]:
    """The images below the folder at ``path``; ``place`` has its real path.

    Raises: ImageForbidden, ImageNotFound if it cannot be opened; StorageFailed.
    """
    for file in walk(path, after, around, pattern):
        if file.refused is None and not is_image_name(file.path):
            continue
        yield found_file(file, place)


def found_file(file: FoundFile, place: Place) -> Found:
    """What a listing of a folder says of a file."""
    name = escape_name(file.path)
    refused = None if file.refused is None else (file.refused.code, file.refused.message)
    entry = Entry(place.prefix + name, size=file.size, mtime_ns=file.mtime_ns, refused=refused)
    return Found(entry, place, name.removesuffix("/"))


def walk(
    path: str, after: str | None, around: Surroundings, pattern: Pattern
) -> Iterator[FoundFile]:
    """The images and archives below a folder that the pattern names, and folders that cannot be read.

    ``after`` is the path below the folder to go on behind.
    """
    goal = [] if after is None else unescape_name(after).split("/")
    with ExitStack() as opened:
        descriptor = opened.enter_context(around.roots.opened(path))
        root = os.readlink(f"/proc/self/fd/{descriptor}")
        levels = [_level(descriptor, "", pattern.start, around, skipping=bool(goal))]
        opened.callback(_close, levels)
        while levels:
            level = levels[-1]
            with storage_errors(Path(root, level.prefix)):
                following = _next(level, goal[len(levels) - 1] if level.skipping else None)
            if following is None:
                levels.pop()
                if levels:
                    os.close(level.descriptor)
                continue
            name, mark, on_path = following
            if not on_path and level.skipping:
                levels[-1] = level = level._replace(skipping=False)
            state = pattern.step(level.state, name)
            inside = level.prefix + name
            is_last = on_path and len(levels) == len(goal)
            if is_last:
                continue
            if mark == _FOLDER:
                if state:
                    below = _descend(level, name, state, len(levels), around, skipping=on_path)
                    if isinstance(below, _Level):
                        levels.append(below)
                    else:
                        yield FoundFile(f"{inside}/", refused=below)
            elif not on_path and pattern.names(state):
                file = _look(level.descriptor, name, inside, mark, root)
                if file is not None:
                    yield file


def _close(levels: list[_Level]) -> None:
    """Close the folders below the first, which its opener closes."""
    for level in levels[1:]:
        os.close(level.descriptor)


def _level(
    descriptor: int,
    prefix: str,
    state: frozenset[int],
    around: Surroundings,
    *,
    skipping: bool,
) -> _Level:
    names = sorted_names(descriptor, _mark, around.scratch, around.keep_going)
    return _Level(descriptor, prefix, state, names, skipping)


def _mark(entry: os.DirEntry[str]) -> str | None:
    if entry.is_symlink():
        return _LINK
    if entry.is_dir(follow_symlinks=False):
        return _FOLDER
    wanted = is_image_name(entry.name) or is_set_name(entry.name)
    return _FILE if wanted and entry.is_file(follow_symlinks=False) else None


def _next(level: _Level, goal: str | None) -> tuple[str, str, bool] | None:
    """The next name of a level, its mark, and whether it leads to where the listing goes on."""
    for name, mark in level.names:
        if goal is None or name > goal:
            return name, mark, False
        if name == goal:
            return name, mark, True
    return None


def _descend(
    level: _Level,
    name: str,
    state: frozenset[int],
    depth: int,
    around: Surroundings,
    *,
    skipping: bool,
) -> _Level | EntryRefused | ImageForbidden | ImageNotFound:
    inside = level.prefix + name
    if depth >= MAX_DEPTH:
        return EntryRefused(f"{shown(inside)} is more than {MAX_DEPTH} folders deep")
    try:
        descriptor = os.open(name, _OPEN_FOLDER, dir_fd=level.descriptor)
    except OSError as error:
        if error.errno in MISSING:
            return ImageNotFound(f"the folder {shown(inside)} is gone")
        if error.errno in REFUSED:
            return ImageForbidden(f"the server may not read the folder {shown(inside)}")
        raise StorageFailed(f"reading {shown(inside)} failed: {error.strerror}") from error
    return _level(descriptor, f"{inside}/", state, around, skipping=skipping)


def _look(descriptor: int, name: str, inside: str, mark: str, root: str) -> FoundFile | None:
    """What is listed of a file or link."""
    if mark == _LINK:
        return _look_at_link(descriptor, name, inside, root)
    try:
        status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError as error:
        if error.errno in MISSING | REFUSED:
            return FoundFile(inside)  # reading it says what is wrong
        raise StorageFailed(f"reading {shown(inside)} failed: {error.strerror}") from error
    return FoundFile(inside, status.st_size, status.st_mtime_ns)


def _look_at_link(descriptor: int, name: str, inside: str, root: str) -> FoundFile | None:
    try:
        status = os.stat(name, dir_fd=descriptor)
    except OSError as error:
        if error.errno in {*MISSING, *REFUSED, errno.ELOOP}:
            return FoundFile(inside) if is_image_name(name) else None
        raise StorageFailed(f"reading {shown(inside)} failed: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        return FoundFile(inside) if is_image_name(name) or is_set_name(name) else None
    target = os.path.realpath(f"/proc/self/fd/{descriptor}/{name}")
    if f"{target}/".startswith(f"{root}/") or f"{root}/".startswith(f"{target}/"):
        return None  # what is in it is listed where it really is
    return FoundFile(
        f"{inside}/",
        refused=EntryRefused(
            f"{shown(inside)} is a link to a folder, which is not followed; name that folder itself"
        ),
    )
