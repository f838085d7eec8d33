"""Figures, their targets, and how they are shown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

Sense = Literal[">=", "<=", "<"]

_HOLDS: dict[Sense, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
}


class Target(msgspec.Struct, frozen=True):
    """What a figure should be, in the figure's unit."""

    sense: Sense
    value: float


class Figure(msgspec.Struct, frozen=True):
    """One measured number. ``made_of`` says what it was computed from."""

    benchmark: str
    name: str
    value: float
    unit: str
    target: Target | None = None
    made_of: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return _HOLDS[self.target.sense](self.value, self.target.value)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of all samples do not exceed."""
    ordered = sorted(samples)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = [("benchmark", "figure", "measured", "target", "", "made of")]
    rows += [
        (
            figure.benchmark,
            figure.name,
            _number(figure.value, figure.unit),
            _target(figure),
            {None: "", True: "pass", False: "MISS"}[figure.passed],
            figure.made_of,
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def milliseconds(seconds: float) -> float:
    """Seconds as milliseconds."""
    return seconds * 1000


def write_json(
    path: Path, figures: Sequence[Figure], about: dict[str, str], **more: object
) -> None:
    """Write the figures, with whether each passed, and what is to be known ``about`` the run."""
    rows = [{**msgspec.to_builtins(figure), "passed": figure.passed} for figure in figures]
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.encode({"about": about, "figures": rows, **more})
    path.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")


def _number(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".rstrip()


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{figure.target.sense} {_number(figure.target.value, figure.unit)}"
