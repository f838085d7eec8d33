"""The rows that were kept from training, as the comparison asks about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import StorageFailed
from shared.storage import read_json

IMAGES = "images"
HELD_OUT = "held_out.json"
_MARK = "<image>"
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class HeldOutRow:
    """One conversation up to its last answer, which is the ``reference``.

    ``turns`` are ``(role, text)`` with the image's mark taken out: xtuner puts a row's image in front
    of the question that has the mark, which is ``turns[image_turn]``.
    """

    image: Path | None
    name: str
    turns: tuple[tuple[str, str], ...]
    reference: str
    image_turn: int = 0

    @property
    def question(self) -> str:
        """The last question."""
        return self.turns[-1][1]


def read_held_out(folder: Path, limit: int) -> list[HeldOutRow]:
    """The first ``limit`` held-out rows of a job's folder, which are in random order."""
    data = folder / "data"
    rows = read_json(data / HELD_OUT)
    if not isinstance(rows, list):
        raise StorageFailed(f"{data / HELD_OUT} is missing; the job's folder was changed")
    return [_row(row, data / IMAGES) for row in rows[:limit]]


def _row(row: dict[str, Any], images: Path) -> HeldOutRow:
    marked = [index for index, turn in enumerate(row["conversations"]) if _MARK in turn["value"]]
    turns = [
        (_ROLES[turn["from"]], turn["value"].replace(_MARK, "").strip())
        for turn in row["conversations"]
    ]
    *asked, (_, reference) = turns
    name = row.get("image")
    return HeldOutRow(
        image=None if name is None else images / name,
        name=name or "",
        turns=tuple(asked),
        reference=reference,
        image_turn=marked[0] if marked else 0,
    )
