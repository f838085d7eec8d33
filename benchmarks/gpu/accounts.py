"""Whether every item of a batch ended as exactly one line, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec


class Accounts(msgspec.Struct, frozen=True):
    """``failed`` counts the failures by their code; ``examples`` has a message of each."""

    items: int
    answered: int
    failed: dict[str, int]
    examples: dict[str, str]
    missing: int
    """Items without any line."""
    repeated: int
    """Lines beyond an item's first."""

    @property
    def unaccounted(self) -> int:
        """Items that do not have exactly one line, and surplus lines."""
        return self.missing + self.repeated

    def told(self) -> str:
        """In words."""
        codes = [f"{count} {code}" for code, count in sorted(self.failed.items())]
        return f"{self.answered} answered" + (f"; failed: {', '.join(codes)}" if codes else "")


class _Line(msgspec.Struct):
    custom_id: str
    response: dict[str, msgspec.Raw] | None
    error: dict[str, str] | None


class _Refusal(msgspec.Struct):
    error: _Reason


class _Reason(msgspec.Struct):
    code: str | None
    message: str


def account(outputs: Iterable[bytes], errors: Iterable[bytes], items: int) -> Accounts:
    """Read the lines of both result files; custom ids are ``item-N`` with N below ``items``."""
    seen: Counter[int] = Counter()
    failed: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for text in outputs:
        seen[_number(msgspec.json.decode(text, type=_Line))] += 1
    answered = seen.total()
    for text in errors:
        line = msgspec.json.decode(text, type=_Line)
        seen[_number(line)] += 1
        code, message = _reason(line)
        failed[code] += 1
        examples.setdefault(code, message)
    missing = sum(number not in seen for number in range(items))
    return Accounts(items, answered, dict(failed), examples, missing, seen.total() - len(seen))


def _number(line: _Line) -> int:
    return int(line.custom_id.removeprefix("item-"))


def _reason(line: _Line) -> tuple[str, str]:
    if line.response is None:
        reason = line.error or {}
        return reason.get("code", "?"), reason.get("message", "")
    reason_of = msgspec.json.decode(line.response["body"], type=_Refusal).error
    return reason_of.code or "?", reason_of.message
