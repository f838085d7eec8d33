"""Which item a worker was preparing when it died.

Kept only for chunks that already cost a worker its life: the next attempt notes each item before
touching its images, so that the attempt after that knows whom to blame. The note outlives the
process, not the machine, which is all it is for.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from shared.errors import StorageFailed
from shared.storage import storage_errors

BLAMES_TO_GIVE_UP = 2


class _Notes(msgspec.Struct):
    current: int | None = None
    blames: dict[int, int] = {}


class Journal:
    """The notes about one chunk; ``lines`` are numbers of lines in the input file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notes = self._load()
        if self._notes.current is not None:
            line = self._notes.current
            self._notes.blames[line] = self._notes.blames.get(line, 0) + 1
            self.enter(None)

    def given_up(self, line: int) -> bool:
        """Whether this line has killed its worker too often."""
        return self._notes.blames.get(line, 0) >= BLAMES_TO_GIVE_UP

    def enter(self, line: int | None) -> None:
        """This line is about to be worked on; ``None`` when none is."""
        self._notes.current = line
        with storage_errors(self._path):
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary = self._path.with_suffix(".part")
            temporary.write_bytes(msgspec.json.encode(self._notes))
            temporary.replace(self._path)

    def _load(self) -> _Notes:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Notes)
        except FileNotFoundError:
            return _Notes()
        except (OSError, msgspec.DecodeError) as error:
            raise StorageFailed(f"{self._path}: {error}") from error
