"""From a fine-tune's spec to the files that its data is in: the owner's own only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shared.errors import CheckpointInvalid, DatasetInvalid, InvalidRequest, NotFound, StorageFailed
from shared.finetunes import FinetuneSpec
from shared.ids import is_id
from shared.jobs import Batch
from shared.learnable import learnable_batch
from shared.manifest import Manifest
from shared.settings import Settings
from shared.stores import Stores
from workers.inference.engines.base import Tiling
from workers.inference.entry_images import EntryImages
from workers.inference.image_sources import ImageReader
from workers.inference.uploads import upload_opener
from workers.training.batch_rows import BatchFiles
from workers.training.caption_rows import CaptionBatch, CaptionWishes
from workers.training.data_report import DataReport
from workers.training.dataset import GivenRows, Inputs, Limits, prepare
from workers.training.row_lengths import (
    CountTokens,
    Family,
    RowLengths,
    TokenRules,
    controls_of,
)

_FAMILIES: dict[str, Family] = {
    "InternLM2ForCausalLM": "internlm2",
    "Phi3ForCausalLM": "phi3",
}


def prepare_job(
    spec: FinetuneSpec, stores: Stores, base: Path, keep_going: Callable[[], None]
) -> DataReport:
    """Make the ``data`` folder of a fine-tune whose base's checkpoint is the folder ``base``.

    Raises: as ``dataset.prepare``; CheckpointInvalid if the base cannot be tuned.
    """
    rules = token_rules(base)
    lengths = RowLengths(rules, token_counter(base, rules.family))
    with opened_inputs(spec, stores) as inputs:
        return prepare(
            stores.layout.finetune_dir(spec.id),
            spec.data,
            inputs,
            seed=spec.seed,
            max_length=spec.recipe.max_length,
            lengths=lengths,
            limits=limits_of(stores.settings),
            keep_going=keep_going,
        )


def limits_of(settings: Settings) -> Limits:
    """What this server accepts."""
    return Limits(
        images=settings.images,
        max_rows=settings.finetune.max_rows,
        max_row_bytes=settings.queue.max_line_bytes,
        min_free_bytes=settings.storage.min_free_bytes,
    )


@contextmanager
def opened_inputs(spec: FinetuneSpec, stores: Stores) -> Iterator[Inputs]:
    """The files and batches that the spec names. Raises: DatasetInvalid naming the field."""
    data, owner = spec.data, spec.owner
    images = data.images
    is_archive = images is not None and is_id(images, "file-")
    with ExitStack() as opened:
        reader = ImageReader(stores.settings.images, upload_opener(stores, owner))
        opened.callback(reader.close)

        def rows(name: str, param: str) -> GivenRows:
            if not is_id(name, "batch_"):
                return _upload(stores, owner, name, param)
            given = _batch_rows(stores, spec, name, param, reader)
            if isinstance(given, CaptionBatch):
                opened.callback(given.close)
            return given

        yield Inputs(
            training=rows(data.training_file, "training_file"),
            load_image=reader.load,
            validation=None
            if data.validation_file is None
            else rows(data.validation_file, "validation_file"),
            archive=_upload(stores, owner, images, "images")
            if images is not None and is_archive
            else None,
            folder=None
            if images is None or is_archive
            else image_folder(images, stores.settings.images.roots),
        )


def _upload(stores: Stores, owner: str, file_id: str, param: str) -> Path:
    try:
        return stores.files.content_path(owner, file_id)
    except NotFound:
        raise DatasetInvalid(f"there is no file '{file_id}'", param=param) from None


def image_folder(name: str, roots: tuple[Path, ...]) -> Path:
    """The folder that rows name files in, all links followed. Raises: DatasetInvalid."""
    problem = DatasetInvalid(
        "images must be the id of an uploaded archive, or the absolute path of a folder inside one "
        "that this server may read images from (the setting images.roots)",
        param="images",
    )
    if "\0" in name or not name.startswith("/") or ".." in name.split("/"):
        raise problem
    try:
        real = Path(os.path.realpath(name))
    except OSError:
        raise problem from None
    # Outside of the roots nobody learns whether anything is there.
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        raise problem
    if not real.is_dir():
        raise DatasetInvalid(f"there is no folder {name}", param="images")
    return real


def _batch_rows(
    stores: Stores, spec: FinetuneSpec, batch_id: str, param: str, reader: ImageReader
) -> BatchFiles | CaptionBatch:
    owner = spec.owner
    try:
        batch = learnable_batch(stores, owner, batch_id)
        if batch.source is not None:
            return _caption_batch(stores, spec, batch, param, reader)
        input_, output, errors = (
            None if file_id is None else stores.files.content_path(owner, file_id)
            for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id)
        )
    except NotFound as error:
        raise DatasetInvalid(
            f"the batch '{batch_id}' or one of its files is gone: {error.message}", param=param
        ) from None
    except InvalidRequest as error:
        raise DatasetInvalid(error.message, param=param) from None
    assert input_ is not None, "a batch has an input file or an image set"
    return BatchFiles(input_, output, errors)


def _caption_batch(
    stores: Stores, spec: FinetuneSpec, batch: Batch, param: str, reader: ImageReader
) -> CaptionBatch:
    folder = stores.batches.folder(batch.id)
    if not Manifest.exists(folder):
        raise DatasetInvalid(
            f"the list of the images of the batch '{batch.id}' is gone", param=param
        )
    # All questions were asked by then; times are kept in whole seconds.
    asked_by = (batch.finalizing_at or batch.created_at) + 1
    images = stores.settings.images
    uploads = upload_opener(stores, spec.owner)
    return CaptionBatch(
        batch,
        stores.results,
        Manifest(folder),
        lambda: EntryImages(images, uploads, reader.load, texts_until_s=asked_by),
        CaptionWishes(spec.data.prompt, spec.data.keep_flagged),
        param,
    )


# --- what the base makes of rows --------------------------------------------------------------


def token_rules(base: Path) -> TokenRules:
    """How xtuner cuts images and lays out chats for this base. Raises: CheckpointInvalid."""
    path = base / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        vision = config["vision_config"]
        architecture = config["llm_config"]["architectures"][0]
        side = int(config.get("force_image_size") or vision["image_size"])
        patches = side // int(vision["patch_size"])
        rules = TokenRules(
            Tiling(
                side,
                int(config["min_dynamic_patch"]),
                int(config["max_dynamic_patch"]),
                thumbnail=bool(config["use_thumbnail"]),
            ),
            int(patches**2 * float(config["downsample_ratio"]) ** 2),
            _FAMILIES.get(architecture, "internlm2"),
        )
    except OSError as error:
        raise StorageFailed(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointInvalid(f"{path} is no InternVL config: {error!r}") from error
    if architecture not in _FAMILIES:
        raise CheckpointInvalid(
            f"the base's language model is {architecture}; xtuner tunes only "
            f"{' and '.join(_FAMILIES)}",
            param="model",
        )
    return rules


def token_counter(base: Path, family: Family) -> CountTokens | None:
    """Counts tokens as the base does, or ``None`` where its tokenizer cannot be read here."""
    try:
        from workers.inference.internvl import tokenizer
    except ImportError:
        return None
    try:
        return tokenizer.token_counter(base, controls_of(family))
    except tokenizer.TokenizerInvalid:
        return None
