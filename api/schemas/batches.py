"""Batches on the wire."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field, StringConstraints

from api.schemas.common import Body, Expiry, Fields
from shared.jobs import Batch
from shared.pace import items_per_second, seconds_left
from shared.tally import CAPTIONS, FAILED, RESAMPLED, REVIEW, of_kind

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class CreateBatch(Body):
    """The body of ``POST /v1/batches``.

    ``completion_window`` is ``24h`` as OpenAI has it, or any number of minutes, hours or days:
    ``90m``, ``48h``, ``7d``.
    """

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    endpoint: Literal["/v1/chat/completions"]
    completion_window: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,4}[mhd]$")]
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None


class BatchListQuery(Fields):
    """The query of ``GET /v1/batches``."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class ResultsQuery(Fields):
    """The query of ``GET /v1/batches/{id}/results``: after which input line, how many lines."""

    after: Annotated[int, Field(ge=0, lt=2**63)] = 0
    limit: Annotated[int, Field(ge=1, le=100_000)] = 1000


class RowsQuery(ResultsQuery):
    """The query of ``GET /v1/batches/{id}/rows``; ``messages`` asks for all that was asked."""

    messages: bool = False


class RequestCounts(BaseModel):
    """Lines of the input: all of them, those answered, those failed."""

    total: int
    completed: int
    failed: int


class CachedTokens(BaseModel):
    """Of the input tokens."""

    cached_tokens: int = 0


class ReasoningTokens(BaseModel):
    """Of the output tokens."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of all lines done so far, image tokens included."""

    input_tokens: int
    input_tokens_details: CachedTokens = CachedTokens()
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class ListingState(BaseModel):
    """How far the image set is listed: all of it, and images (and unusable entries) so far."""

    complete: bool
    images: int


class BatchProgress(BaseModel):
    """How fast lines are done, and how long what is known will take; null before that can be said."""

    items_per_second: float | None
    seconds_left: int | None


class GateCounts(BaseModel):
    """Captions that the quality gate found something in, in all and by reason."""

    captions: int
    reasons: dict[str, int]


class QualityState(BaseModel):
    """Captions to be reviewed, and those of which answers were thrown away and asked for again."""

    review: GateCounts
    resampled: GateCounts


class Preflight(BaseModel):
    """What the whole set would come to, by its sample.

    ``images`` were looked at, all of the set if ``complete``; ``seconds`` and ``output_bytes`` are
    for these. ``bad_share`` is the part of the sample that failed. Null before a chunk is done.
    """

    images: int
    complete: bool
    sampled: int
    images_per_second: float | None
    seconds: int | None
    output_bytes: int | None
    bad_share: float | None


class SyncState(BaseModel):
    """How many images of a sync, so far, are not asked about again.

    Those with captions from before, those that are the same as an earlier one, and those left out.
    """

    known: int
    duplicates: int
    passed: int


class BatchExtras(BaseModel):
    """What OpenAI's object has no room for.

    ``warning`` is the code of a passing trouble, ``retry_of`` the batch whose failed lines these
    are; ``failures`` counts failed lines by code. Only a caption job has ``captions``, what it was asked,
    and ``listing``; only one with a gate has ``quality``, only one with a sample ``preflight``, only
    one that syncs its set ``sync``.
    """

    warning: str | None
    retry_of: str | None
    captions: dict[str, Any] | None
    listing: ListingState | None
    progress: BatchProgress
    failures: dict[str, int]
    quality: QualityState | None
    preflight: Preflight | None
    sync: SyncState | None


class BatchObject(BaseModel):
    """A batch. Every key is always there; times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: dict[str, Any] | None
    input_file_id: str | None
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    vlmq: BatchExtras

    @classmethod
    def of(cls, batch: Batch) -> BatchObject:
        """The wire's view of a batch."""
        return cls(
            id=batch.id,
            endpoint=batch.endpoint,
            model=batch.model,
            errors=_problems(batch),
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            status=_status(batch),
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            created_at=batch.created_at,
            in_progress_at=batch.in_progress_at,
            expires_at=batch.expires_at,
            finalizing_at=batch.finalizing_at,
            completed_at=batch.completed_at,
            failed_at=batch.failed_at,
            expired_at=batch.expired_at,
            cancelling_at=batch.cancelling_at,
            cancelled_at=batch.cancelled_at,
            request_counts=RequestCounts(
                total=batch.total, completed=batch.completed, failed=batch.failed
            ),
            usage=BatchUsage(
                input_tokens=batch.prompt_tokens,
                output_tokens=batch.completion_tokens,
                total_tokens=batch.prompt_tokens + batch.completion_tokens,
            ),
            metadata=batch.metadata,
            vlmq=BatchExtras(
                warning=batch.warning,
                retry_of=batch.retry_of,
                captions=None if batch.source is None else msgspec.to_builtins(batch.source),
                listing=_listing(batch),
                progress=_progress(batch),
                failures=of_kind(batch.counts, FAILED),
                quality=_quality(batch),
                preflight=_preflight(batch),
                sync=_sync(batch),
            ),
        )


def _status(batch: Batch) -> str:
    """A request to cancel is a field of ours and a status on the wire."""
    if batch.stop_reason == "cancelled" and not batch.is_terminal:
        return "cancelling"
    return batch.state.value


def _listing(batch: Batch) -> ListingState | None:
    if batch.source is None:
        return None
    # A sync may find that there is nothing to do; it is listed once it is no longer validated.
    begun = batch.chunks > 0 or batch.passed > 0
    complete = begun and not batch.listing
    return ListingState(complete=complete, images=batch.total)


def _progress(batch: Batch) -> BatchProgress:
    now_s = time.time()
    rate = items_per_second(batch, now_s)
    return BatchProgress(
        items_per_second=None if rate is None else round(rate, 3),
        seconds_left=seconds_left(batch, now_s),
    )


def _quality(batch: Batch) -> QualityState | None:
    if batch.source is None or batch.source.quality is None:
        return None
    captions = of_kind(batch.counts, CAPTIONS)
    review, resampled = (
        GateCounts(captions=captions.get(kind, 0), reasons=of_kind(batch.counts, kind))
        for kind in (REVIEW, RESAMPLED)
    )
    return QualityState(review=review, resampled=resampled)


def _preflight(batch: Batch) -> Preflight | None:
    if batch.seen is None:
        return None
    rate, done = items_per_second(batch, time.time()), batch.completed + batch.failed
    return Preflight(
        images=batch.seen,
        complete=batch.seen_all,
        sampled=batch.total,
        images_per_second=None if rate is None else round(rate, 3),
        seconds=math.ceil(batch.seen / rate) if rate else None,
        output_bytes=round(batch.output_bytes / done * batch.seen) if done else None,
        bad_share=round(batch.failed / done, 4) if done else None,
    )


def _sync(batch: Batch) -> SyncState | None:
    if batch.source is None or batch.source.sync is None:
        return None
    return SyncState(known=batch.known, duplicates=batch.duplicates, passed=batch.passed)


def _problems(batch: Batch) -> dict[str, Any] | None:
    if not batch.problems:
        return None
    data = [
        {"code": item.code, "message": item.message, "param": item.param, "line": item.line}
        for item in batch.problems
    ]
    return {"object": "list", "data": data}
