"""Whether a fine-tune may have what it names: base model, files, a batch, images, a configuration.

Whatever is wrong is said before the job exists. The worker checks again, for all of it may change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from api import current
from api.schemas.finetune_request import CreateFinetune, Options
from shared.checkpoints import CONFIG
from shared.errors import Forbidden, InvalidRequest, InvalidValue, NotFound
from shared.files import OUTPUT_PURPOSE, FileRecord
from shared.finetunes import FinetuneSpec
from shared.jobs import Batch
from shared.learnable import batch_of_output, learnable_batch
from shared.models import MAX_NAME_CHARACTERS
from shared.tunable import WHAT_WORKS, require_consent, require_tunable

_LONGEST_CHECKPOINT = ":ckpt-step-9999999"
_DATA_PURPOSES = ("fine-tune",)
_ARCHIVE_PURPOSES = ("fine-tune", "vision", "user_data")


def check_sources(asked: CreateFinetune) -> CreateFinetune:
    """The request with batches named where it names their output files.

    Raises: ModelNotFound, InvalidValue or Forbidden whose ``param`` is the field.
    """
    _check_model(asked.model)
    batches = {
        param: _data(file_id, param)
        for param, file_id in (
            ("training_file", asked.training_file),
            ("validation_file", asked.validation_file),
        )
        if file_id is not None
    }
    _check_options(asked.vlmq, batches)
    return asked.model_copy(
        update={param: batch.id for param, batch in batches.items() if batch is not None}
    )


def check_name(spec: FinetuneSpec) -> None:
    """Make sure that the tuned model, and each checkpoint's, can be registered under its name.

    Raises: InvalidValue for ``suffix`` (for ``model`` if there is none).
    """
    excess = len(spec.tuned_name) + len(_LONGEST_CHECKPOINT) - MAX_NAME_CHARACTERS
    if excess > 0:
        raise InvalidValue(
            f"the tuned model's name would be {excess} characters too long; choose a shorter "
            "suffix, or link the base under a shorter name",
            param="suffix" if spec.suffix else "model",
        )


def _check_model(name: str) -> None:
    record = current.visible_model(name)
    if record.path is None:
        raise InvalidValue(
            f"the model '{name}' has no checkpoint that could be tuned; {WHAT_WORKS}", param="model"
        )
    # A checkpoint may lie on a worker's own disk; the worker looks then.
    if (Path(record.path) / CONFIG).is_file():
        require_tunable(name, Path(record.path))
        require_consent(record)
    refusal = current.stores().presence.refusal(name)
    if refusal is not None:
        raise InvalidValue(
            f"no engine can serve the model '{name}', so what is tuned from it could be neither "
            f"compared nor served ({refusal}); have it served first, then create the job",
            param="model",
        )


def _data(file_id: str, param: str) -> Batch | None:
    """The batch that a field names, by its id or its output file's; None for a file of rows."""
    if file_id.startswith("batch_"):
        return _batch(file_id, param)
    record = _file(file_id, param)
    if record.purpose == OUTPUT_PURPOSE:
        batch_id = batch_of_output(record)
        if batch_id is None:
            raise InvalidValue(
                f"the file '{file_id}' holds what failed of a batch; name the batch itself, or its "
                "output file",
                param=param,
            )
        return _batch(batch_id, param)
    _check_purpose(record, _DATA_PURPOSES, param)
    return None


def _batch(batch_id: str, param: str) -> Batch:
    """Its requests are learned from with its answers, so what they were must still be there, too."""
    try:
        return learnable_batch(current.stores(), current.owner(), batch_id)
    except (InvalidRequest, NotFound) as error:
        raise InvalidValue(error.message, param=param) from None


def _check_options(options: Options, batches: Mapping[str, Batch | None]) -> None:
    sources = [batch.source for batch in batches.values() if batch and batch.source]
    is_batch = batches["training_file"] is not None
    if options.format != "auto" and is_batch != (options.format == "batch"):
        raise InvalidValue(
            f"vlmq.format: '{options.format}' does not fit the training_file; the format 'batch' goes "
            "with the id of a batch, or of its output file",
            param="vlmq.format",
        )
    if options.prompt is not None and not sources:
        raise InvalidValue(
            "vlmq.prompt goes with a caption job as data; other rows have questions of their own",
            param="vlmq.prompt",
        )
    if options.keep_flagged and not any(source.quality for source in sources):
        raise InvalidValue(
            "vlmq.keep_flagged goes with a caption job that has a quality gate; nothing else is "
            "flagged",
            param="vlmq.keep_flagged",
        )
    if options.images is not None:
        if len(sources) == len(batches):
            raise InvalidValue(
                "vlmq.images has no effect: a caption job's images are where the job found them",
                param="vlmq.images",
            )
        _check_images(options.images)
    if options.config_file is not None:
        _require_config_right()
        _check_file(options.config_file, ("fine-tune", "user_data"), "vlmq.config_file")


def _check_file(file_id: str, purposes: tuple[str, ...], param: str) -> None:
    _check_purpose(_file(file_id, param), purposes, param)


def _file(file_id: str, param: str) -> FileRecord:
    try:
        return current.stores().files.get(current.owner(), file_id)
    except NotFound as error:
        raise InvalidValue(error.message, param=param) from None


def _check_purpose(record: FileRecord, purposes: tuple[str, ...], param: str) -> None:
    if record.purpose not in purposes:
        raise InvalidValue(
            f"the file '{record.id}' was uploaded for '{record.purpose}'; upload it for "
            f"'{purposes[0]}'",
            param=param,
        )


def _check_images(place: str) -> None:
    param = "vlmq.images"
    if place.startswith("file-"):
        _check_file(place, _ARCHIVE_PURPOSES, param)
        return
    roots = current.stores().settings.images.roots
    if not roots:
        raise InvalidValue(
            "this server reads no images from its disk; upload an archive (tar or zip) to "
            "/v1/files and name it, or let the operator name folders in the setting images.roots",
            param=param,
        )
    if "\0" in place or not place.startswith("/") or ".." in place.split("/"):
        raise InvalidValue(
            "vlmq.images: name an uploaded archive (file-…), or a folder by its absolute path "
            "without '..'",
            param=param,
        )
    real = Path(os.path.realpath(place))
    # The same answer whether or not something is there: outside is nobody's business.
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        raise InvalidValue(
            "vlmq.images: that is not inside a folder this server may read images from (the "
            "setting images.roots); upload an archive to /v1/files instead",
            param=param,
        )
    if not os.path.isdir(real):  # noqa: PTH112 - says no where Path.is_dir fails, for long names
        raise InvalidValue("vlmq.images: there is no such folder", param=param)


def _require_config_right() -> None:
    if current.owner() not in current.stores().settings.finetune.config_owners:
        raise Forbidden(
            "a configuration is code that runs on the server, so only owners named in the setting "
            "finetune.config_owners may send one; use the options of vlmq instead",
            param="vlmq.config_file",
        )
