"""Every failure vlmq reports, as one tree.

An exception's docstring is its default message. ``code`` is what a client sees; ``retryable``
says whether the same request may succeed later, ``retry_after_s`` when to try. HTTP statuses live in ``shared.statuses`` so that
the API and the lines of a batch's error file agree.
"""

from __future__ import annotations

from typing import Any, ClassVar


class VlmqError(Exception):
    """Something went wrong inside vlmq; the log has the details."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    retry_after_s: ClassVar[int] = 1
    """When to try again, if ``retryable``."""

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        self.param = param
        super().__init__(self.message)


# --- the request is wrong ---------------------------------------------------------------------


class InvalidRequest(VlmqError):
    """The request is not valid."""

    code = "invalid_request"


class InvalidValue(InvalidRequest):
    """A field has a value of the wrong type or outside its range."""

    code = "invalid_value"


class InvalidJson(InvalidRequest):
    """The text is not valid JSON."""

    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """This parameter is not supported."""

    code = "unsupported_parameter"


class DuplicateCustomId(InvalidRequest):
    """An earlier line of this file already uses this custom_id; custom_ids must be unique."""

    code = "duplicate_custom_id"


class ModelMismatch(InvalidRequest):
    """All lines of a batch must name the same model."""

    code = "model_mismatch"


class EmptyFile(InvalidRequest):
    """The file holds no requests."""

    code = "empty_file"


class FileInUse(InvalidRequest):
    """A batch or fine-tune that has not finished reads this file; cancel that one first."""

    code = "file_in_use"


class ContextLengthExceeded(InvalidRequest):
    """The prompt and its images are longer than the model's session length."""

    code = "context_length_exceeded"


class RemoteCodeRefused(InvalidRequest):
    """The checkpoint carries its own code; link it with --trust-remote-code to run it."""

    code = "remote_code_refused"


class CheckpointInvalid(InvalidRequest):
    """The checkpoint is not whole; copy it anew."""

    code = "checkpoint_invalid"


class IdempotencyMismatch(InvalidRequest):
    """This Idempotency-Key was used before with another request."""

    code = "idempotency_mismatch"


class IdempotencyInProgress(VlmqError):
    """A request with this Idempotency-Key is still being worked on; try again shortly."""

    code = "idempotency_in_progress"
    retryable = True


class BodyTooLarge(VlmqError):
    """The request body is larger than this server accepts."""

    code = "body_too_large"


class NotAuthenticated(VlmqError):
    """No valid API key was sent; pass one as 'Authorization: Bearer <key>'."""

    code = "invalid_api_key"


class Forbidden(VlmqError):
    """This API key may not do that."""

    code = "forbidden"


class NotFound(VlmqError):
    """There is no such object."""

    code = "not_found"


class ModelNotFound(NotFound):
    """There is no such model; GET /v1/models lists those linked."""

    code = "model_not_found"


class MethodNotAllowed(VlmqError):
    """This address does not answer that HTTP method."""

    code = "method_not_allowed"


class RateLimited(VlmqError):
    """Too many requests wait already; try again shortly."""

    code = "rate_limited"
    retryable = True


# --- the data of a fine-tune is wrong ---------------------------------------------------------


class DatasetInvalid(InvalidRequest):
    """The training data cannot be used as it is.

    ``report`` holds what was found until then, in the form of the job's ``data_report``.
    """

    code = "dataset_invalid"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.report: dict[str, Any] = report or {}


class DatasetFormatUnclear(DatasetInvalid):
    """The format of the rows cannot be told; name it in the job's 'format'."""

    code = "dataset_format_unclear"


class TooManyRows(DatasetInvalid):
    """The dataset has more rows than this server accepts."""

    code = "too_many_rows"


class TooManyBadRows(DatasetInvalid):
    """Too large a share of the rows cannot be used."""

    code = "too_many_bad_rows"


class TooFewRows(DatasetInvalid):
    """Too few rows can be used."""

    code = "too_few_rows"


class ArchiveInvalid(DatasetInvalid):
    """The archive of images cannot be read."""

    code = "archive_invalid"


class RowUnusable(InvalidRequest):
    """The row cannot be trained on.

    ``reason`` is what rows dropped for the same fault are counted under. Without ``is_fault`` the row is
    left out because that was asked for, which says nothing against the data.
    """

    code = "row_unusable"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        reason: str | None = None,
        is_fault: bool = True,
    ) -> None:
        super().__init__(message, param=param)
        self.reason = reason or self.code
        self.is_fault = is_fault


# --- an image is wrong ------------------------------------------------------------------------


class ImageError(InvalidRequest):
    """The image cannot be used."""

    code = "image_invalid"


class ImageUnreadable(ImageError):
    """The bytes are not an image of a supported type (JPEG, PNG, WebP, GIF, BMP or TIFF)."""

    code = "image_unreadable"


class ImageTruncated(ImageError):
    """The image ends before its last pixel; the file was probably not copied in full."""

    code = "image_truncated"


class ImageTooLarge(ImageError):
    """The image has more pixels or bytes than this server accepts."""

    code = "image_too_large"


class ImageNotFound(ImageError):
    """There is no image at that place."""

    code = "image_not_found"


class ImageForbidden(ImageError):
    """Images may not be read from that place."""

    code = "image_forbidden"


class ImageDownloadFailed(ImageError):
    """The image could not be downloaded."""

    code = "image_download_failed"


class ImageChanged(ImageError):
    """The file is not what it was when the image set was listed; retry it, or list the set anew."""

    code = "image_changed"


class EntryRefused(ImageError):
    """The entry of the image set is no image that may be read."""

    code = "entry_refused"


class TextMissing(InvalidRequest):
    """The template needs a text that this image does not have."""

    code = "text_missing"


class SyncInProgress(InvalidRequest):
    """Another batch is syncing this image set."""

    code = "sync_in_progress"


class ImageSetUnreadable(InvalidRequest):
    """The image set cannot be listed."""

    code = "image_set_unreadable"


# --- the work could not be done ---------------------------------------------------------------


class EngineError(VlmqError):
    """The engine failed on this request."""

    code = "engine_error"


class EngineCrashed(EngineError):
    """The engine process died while this request was inside it."""

    code = "engine_crashed"
    retryable = True


class EngineBusy(EngineError):
    """The engine's queue is full."""

    code = "engine_busy"
    retryable = True


class EngineUnavailable(EngineError):
    """No engine for this model answers on this machine right now."""

    code = "engine_unavailable"
    retryable = True


class ImagesCutOtherwise(EngineError):
    """The model was just replaced by one that takes images otherwise; send the request again."""

    code = "images_cut_otherwise"
    retryable = True


class EngineSetupFailed(EngineError):
    """The engine could not load its model."""

    code = "engine_setup_failed"


class WorkerCrashed(VlmqError):
    """The worker process died each time it worked on this request; it was given up."""

    code = "worker_crashed"


class RequestAborted(VlmqError):
    """The client went away or the job was cancelled before the answer was complete."""

    code = "request_aborted"


class ModelUnavailable(VlmqError):
    """No running worker serves this model; start one with 'vlmq worker'."""

    code = "model_unavailable"
    retryable = True


class GpuLent(VlmqError):
    """The GPU of this model's engines is lent to a fine-tune; try again in a while."""

    code = "gpu_lent"
    retryable = True
    retry_after_s = 30


class RequestTimedOut(VlmqError):
    """No answer came in time."""

    code = "timeout"
    retryable = True


class BatchCancelled(VlmqError):
    """The batch was cancelled before this request ran."""

    code = "batch_cancelled"


class BatchExpired(VlmqError):
    """The batch's completion window ended before this request ran."""

    code = "batch_expired"


class HubRefused(VlmqError):
    """The model hub has no such model, or does not let you have it."""

    code = "hub_refused"


class HubUnavailable(VlmqError):
    """The model hub does not answer; what has arrived is kept, try again later."""

    code = "hub_unavailable"
    retryable = True


class ComparisonFailed(VlmqError):
    """The tuned model could not be compared with its base."""

    code = "comparison_failed"


class ComparisonTimedOut(ComparisonFailed):
    """The held-out rows were not answered in time; the job is paused, resume it to go on."""

    code = "comparison_timed_out"


class TrainingFailed(VlmqError):
    """The fine-tune could not be finished; its checkpoints are kept."""

    code = "training_failed"


class TrainingCrashed(TrainingFailed):
    """Training died too often without getting any further; its log says why."""

    code = "training_crashed"


class LossBad(TrainingFailed):
    """The loss is no number or went up for good; try a lower learning rate."""

    code = "loss_bad"


class TrainingDataGone(TrainingFailed):
    """The job's own copy of its data was removed while it ran; create the job again."""

    code = "training_data_gone"


class BaseModelGone(TrainingFailed):
    """The base model was removed while it was being tuned; link it again and create a new job."""

    code = "base_model_gone"


class ConversionFailed(TrainingFailed):
    """The checkpoint could not be turned into a model's folder."""

    code = "conversion_failed"


class TrainingConfigInvalid(InvalidRequest):
    """The configuration cannot be used for training."""

    code = "training_config_invalid"


# --- the ground gave way ----------------------------------------------------------------------


class StorageFull(VlmqError):
    """The disk that holds vlmq's data is full; nothing was lost, free some space and go on."""

    code = "storage_full"
    retryable = True


class NotEnoughDisk(StorageFull):
    """The disk cannot hold this fine-tune's checkpoints and model."""

    code = "not_enough_disk"
    retryable = False


class StorageFailed(VlmqError):
    """The shared storage could not be read or written."""

    code = "storage_failed"
    retryable = True


class QueueUnavailable(VlmqError):
    """Redis does not answer; nothing was lost, try again shortly."""

    code = "queue_unavailable"
    retryable = True


class LeaseLost(VlmqError):
    """Another worker holds this piece of work now; what this one computed is dropped."""

    code = "lease_lost"


class IllegalTransition(VlmqError):
    """The job is not in a state that allows this."""

    code = "illegal_transition"


class ConfigurationError(VlmqError):
    """The configuration is not valid."""

    code = "configuration_error"


def _tree(cls: type[VlmqError]) -> list[type[VlmqError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _tree(sub))]


BY_CODE: dict[str, type[VlmqError]] = {cls.code: cls for cls in reversed(_tree(VlmqError))}


def from_code(code: str, message: str, param: str | None = None) -> VlmqError:
    """The error a peer reported by its code; an unknown code becomes a plain :class:`VlmqError`."""
    return BY_CODE.get(code, VlmqError)(message, param=param)
