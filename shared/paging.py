"""A page of a list, as the wire pages: by the id of the last thing seen."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from shared.errors import InvalidValue

T = TypeVar("T")


class Page(Generic[T]):
    """Some items, and whether more follow."""

    def __init__(self, items: list[T], *, has_more: bool) -> None:
        self.items = items
        self.has_more = has_more


def ids_after(
    client: Any, index: str, *, after: str | None, limit: int, newest_first: bool = True
) -> tuple[list[str], bool]:
    """Up to ``limit`` ids of the sorted set ``index`` that follow ``after``, and if more do.

    Raises: InvalidValue for ``after`` if the index does not hold it.
    """
    start = 0
    if after is not None:
        rank = client.zrevrank(index, after) if newest_first else client.zrank(index, after)
        if rank is None:
            raise InvalidValue(f"there is no object with the id '{after}'", param="after")
        start = int(rank) + 1
    found = client.zrange(index, start, start + limit, desc=newest_first)
    ids = [bytes(member).decode() for member in found]
    return ids[:limit], len(ids) > limit
