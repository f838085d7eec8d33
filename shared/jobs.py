"""Records and states of jobs. The one table of a state machine is here; Lua gets it from here.

A request to stop (cancel, or the completion window's end) is a field, ``stop_reason``, not a
state: work in progress sees it with its next renewal and the last to let go finalizes.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from shared.captions import CaptionSource
from shared.ids import derived_id

StopReason = Literal["cancelled", "expired"]


class BatchState(enum.StrEnum):
    """Where a batch is on its way."""

    VALIDATING = "validating"
    """Recorded; its lines are not yet counted and cut into chunks."""
    IN_PROGRESS = "in_progress"
    """Its chunks are being worked on, or wait for a worker."""
    FINALIZING = "finalizing"
    """No chunk is left to do; the output and error files are being written."""
    COMPLETED = "completed"
    """Every line has an output or an error."""
    FAILED = "failed"
    """It could not start: its file holds nothing that could be run."""
    EXPIRED = "expired"
    """Its window ended first; what was done by then is kept."""
    CANCELLED = "cancelled"
    """Its owner stopped it; what was done by then is kept."""


TRANSITIONS: dict[BatchState, frozenset[BatchState]] = {
    BatchState.VALIDATING: frozenset(
        {BatchState.IN_PROGRESS, BatchState.FINALIZING, BatchState.FAILED}
    ),
    BatchState.IN_PROGRESS: frozenset({BatchState.FINALIZING}),
    BatchState.FINALIZING: frozenset(
        {BatchState.COMPLETED, BatchState.CANCELLED, BatchState.EXPIRED}
    ),
    BatchState.COMPLETED: frozenset(),
    BatchState.FAILED: frozenset(),
    BatchState.EXPIRED: frozenset(),
    BatchState.CANCELLED: frozenset(),
}

TERMINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)


class BatchProblem(msgspec.Struct, frozen=True):
    """One thing wrong with a batch's input; ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchSpec(msgspec.Struct, frozen=True):
    """What was asked for; never changes. Times are Unix seconds. ``batch.json`` on disk."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str | None
    """``None`` for an image set, which has ``source``."""
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    retry_of: str | None = None
    """The batch whose failed lines these are."""
    source: CaptionSource | None = None

    @property
    def files_used(self) -> list[str]:
        """The files, and the batch, that must be kept until this batch has ended."""
        if self.source is not None and self.retry_of is not None:
            errors = derived_id("file-", self.retry_of, "errors")
            return [*self.source.file_ids, self.retry_of, errors]
        if self.source is not None:
            return self.source.file_ids
        return [] if self.input_file_id is None else [self.input_file_id]


class Batch(BatchSpec, frozen=True, kw_only=True):
    """A batch as it is now. Times are Unix seconds, counts are lines and tokens."""

    state: BatchState
    model: str | None = None
    stop_reason: StopReason | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    chunks: int = 0
    listing: bool = False
    """Whether more of its image set is to come."""
    known: int = 0
    """Of a sync: images that have captions from before."""
    duplicates: int = 0
    """Of a sync: images that are the same as an earlier one."""
    passed: int = 0
    """Of a sync of what is new only: images that are left out."""
    problems: list[BatchProblem] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    counts: dict[str, int] = {}
    """By reason, as :mod:`shared.tally` names them."""
    output_bytes: int = 0
    """Of the output lines that are committed."""
    started_ms: int | None = None
    """When its first chunk was claimed, by Redis's clock in milliseconds, as all that end so."""
    started_done: int = 0
    """How many lines were done then: some, if Redis was lost and restored."""
    committed_ms: int | None = None
    """When a chunk was last committed."""
    from_ms: int | None = None
    """Since when the present rate is measured."""
    from_done: int = 0
    """How many lines were done then."""
    seen: int | None = None
    """Of a sample: how many images it was taken from."""
    seen_all: bool = True
    """Whether the set has no more images than were seen."""
    warning: str | None = None
    """The code of a passing trouble, such as ``storage_full``."""

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in TERMINAL
