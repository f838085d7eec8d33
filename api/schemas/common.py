"""What all resources share: strictness, expiry, paging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ExpirySeconds = Annotated[int, Field(ge=3600, le=2_592_000)]
"""One hour to thirty days."""


class Body(BaseModel):
    """A JSON body: unknown fields are errors, and a number is not a string."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fields(BaseModel):
    """Query parameters or form fields: unknown ones are errors, numbers come as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoFields(Body):
    """Nothing at all."""


class Expiry(Body):
    """When something is to be deleted: so many seconds after its creation."""

    anchor: Literal["created_at"]
    seconds: ExpirySeconds


def list_object(items: Sequence[BaseModel], *, has_more: bool) -> dict[str, Any]:
    """A page as the SDK's pagers read it: ``data[-1].id`` is what the next page is ``after``."""
    data = [item.model_dump() for item in items]
    return {
        "object": "list",
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
