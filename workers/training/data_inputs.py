"""From a fine-tune's spec to the files that its data is in: the owner's own only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.captions import NOT_FROM_CAPTIONS
from shared.errors import CheckpointInvalid, DatasetInvalid, ImageNotFound, NotFound, StorageFailed
from shared.finetunes import FinetuneSpec
from shared.ids import is_id
from shared.settings import Settings
from shared.stores import Stores
from workers.inference.engines.base import Tiling
from workers.inference.image_sources import ImageReader
from workers.training.batch_rows import BatchFiles
from workers.training.data_report import DataReport
from workers.training.dataset import Inputs, Limits, prepare
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
    """The files that the spec names. Raises: DatasetInvalid naming the field."""
    data, owner = spec.data, spec.owner

    def upload(file_id: str, param: str) -> Path:
        try:
            return stores.files.content_path(owner, file_id)
        except NotFound:
            raise DatasetInvalid(f"there is no file '{file_id}'", param=param) from None

    def open_upload(file_id: str) -> Path:
        try:
            return stores.files.content_path(owner, file_id)
        except NotFound:
            raise ImageNotFound(f"there is no file '{file_id}'") from None

    is_batch = is_id(data.training_file, "batch_")
    images = data.images
    is_archive = images is not None and is_id(images, "file-")
    reader = ImageReader(stores.settings.images, open_upload)
    try:
        yield Inputs(
            training=_batch_files(stores, owner, data.training_file)
            if is_batch
            else upload(data.training_file, "training_file"),
            load_image=reader.load,
            validation=None
            if data.validation_file is None
            else upload(data.validation_file, "validation_file"),
            archive=upload(images, "images") if images is not None and is_archive else None,
            folder=None
            if images is None or is_archive
            else image_folder(images, stores.settings.images.roots),
        )
    finally:
        reader.close()


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


def _batch_files(stores: Stores, owner: str, batch_id: str) -> BatchFiles:
    try:
        batch = stores.batches.get(owner, batch_id)
        if not batch.is_terminal or batch.output_file_id is None:
            raise DatasetInvalid(
                f"the batch '{batch_id}' is {batch.state.value} and has no output to learn from; "
                "wait until it has ended",
                param="training_file",
            )

        if batch.input_file_id is None:
            raise DatasetInvalid(NOT_FROM_CAPTIONS, param="training_file")

        def path(file_id: str | None) -> Path | None:
            return None if file_id is None else stores.files.content_path(owner, file_id)

        return BatchFiles(
            input=stores.files.content_path(owner, batch.input_file_id),
            output=path(batch.output_file_id),
            errors=path(batch.error_file_id),
        )
    except NotFound as error:
        raise DatasetInvalid(
            f"the batch '{batch_id}' or one of its files is gone: {error.message}",
            param="training_file",
        ) from None


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
