"""Small datasets of real images for tests of what makes a fine-tune's data folder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import ImageForbidden
from shared.finetunes import DataSource
from shared.settings import ImageSettings
from workers.inference.engines.base import Tiling
from workers.inference.image_sources import read_data_url
from workers.training.data_report import DataReport
from workers.training.dataset import Inputs, Limits, prepare
from workers.training.row_lengths import RowLengths, TokenRules

LENGTHS = RowLengths(TokenRules(Tiling(448, 1, 12, thumbnail=True), 256))
MAX_ROW_BYTES = 1 << 20


def jpeg(number: int, size: tuple[int, int] = (48, 48), **options: Any) -> bytes:
    """A photograph's file; every ``number`` is another picture."""
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    picture.paste((number * 37 % 256, number * 11 % 256, number % 256), (0, 0, 16, 16))
    file = io.BytesIO()
    picture.save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def llava(image: str | None, number: int = 0, **more: Any) -> dict[str, Any]:
    """A row of LLaVA's format, with or without an image."""
    question = f"<image>\nWhat is it, {number}?" if image is not None else f"What is {number}?"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number}."}]
    return {**({} if image is None else {"image": image}), "conversations": said, **more}


def openai(url: str, answer: str = "A dish.") -> dict[str, Any]:
    """A line of OpenAI's format with one image."""
    return {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": answer},
        ]
    }


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_images(folder: Path, count: int) -> list[str]:
    """``count`` different photographs; their names."""
    folder.mkdir(exist_ok=True)
    names = [f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    return names


def load_inline(url: str) -> bytes:
    """Gets ``data:`` URLs only."""
    if not url.startswith("data:"):
        raise ImageForbidden(f"tests read no image from {url}")
    return read_data_url(url, ImageSettings().max_bytes)


def prepared(
    job: Path,
    training: Any,
    *,
    seed: int = 1,
    lengths: RowLengths = LENGTHS,
    max_length: int = 8192,
    max_rows: int = 1000,
    min_free_bytes: int = 0,
    keep_going: Callable[[], None] = lambda: None,
    images: ImageSettings | None = None,
    validation: Path | None = None,
    archive: Path | None = None,
    folder: Path | None = None,
    load: Callable[[str], bytes] = load_inline,
    **source: Any,
) -> DataReport:
    """Prepare ``training`` (a file, a batch's files, or rows) in the folder ``job``."""
    job.mkdir(exist_ok=True)
    if isinstance(training, list):
        training = write_lines(job.parent / f"{job.name}-rows.jsonl", training)
    return prepare(
        job,
        DataSource("file-training", **{"max_bad_share": 1.0, **source}),
        Inputs(training, load, validation=validation, archive=archive, folder=folder),
        seed=seed,
        max_length=max_length,
        lengths=lengths,
        limits=Limits(images or ImageSettings(), max_rows, MAX_ROW_BYTES, min_free_bytes),
        keep_going=keep_going,
    )


def rows_of(job: Path, name: str) -> list[dict[str, Any]]:
    """The rows of one of the two files in the prepared folder."""
    found: list[dict[str, Any]] = json.loads((job / "data" / f"{name}.json").read_bytes())
    return found
