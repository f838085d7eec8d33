"""Files on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from api.schemas.common import ExpirySeconds, Fields
from shared.errors import InvalidValue
from shared.files import FileRecord

UploadPurpose = Literal["batch", "fine-tune", "vision", "user_data", "assistants", "evals"]
Purpose = Literal[
    "batch",
    "fine-tune",
    "vision",
    "user_data",
    "assistants",
    "evals",
    "batch_output",
    "fine-tune-results",
]


class UploadForm(Fields):
    """The fields around the file of ``POST /v1/files``."""

    purpose: UploadPurpose
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[ExpirySeconds | None, Field(alias="expires_after[seconds]")] = None

    def check(self) -> None:
        """Raise InvalidValue for half an expiry."""
        if (self.anchor is None) != (self.seconds is None):
            missing = "anchor" if self.anchor is None else "seconds"
            raise InvalidValue(
                "expires_after needs both anchor and seconds", param=f"expires_after[{missing}]"
            )


class FileListQuery(Fields):
    """The query of ``GET /v1/files``."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: Purpose | None = None


class FileObject(BaseModel):
    """A file. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, record: FileRecord) -> FileObject:
        """The wire's view of a record."""
        return cls(
            id=record.id,
            bytes=record.bytes,
            created_at=record.created_at,
            expires_at=record.expires_at,
            filename=record.filename,
            purpose=record.purpose,
        )


class DeletedFile(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True
