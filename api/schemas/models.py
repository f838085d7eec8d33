"""Models on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from shared.models import ModelRecord


class ModelObject(BaseModel):
    """A model that may be named in requests; ``created`` is in Unix seconds."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str

    @classmethod
    def of(cls, record: ModelRecord) -> ModelObject:
        """The wire's view of a record."""
        return cls(id=record.name, created=record.created, owned_by=record.owned_by)


class DeletedModel(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
