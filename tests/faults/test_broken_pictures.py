"""Broken pictures on the whole way: no engine dies of one, and each gets its answer or its reason."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as Pillow

from benchmarks.gpu.accounts import Accounts, account
from benchmarks.gpu.mutations import mutated
from benchmarks.http_batches import BatchClient
from tests.faults.batches import line
from tests.running_node import RunningNode, running_node, wait_for
from workers.inference.tiny import CHECKPOINT
from workers.inference.tiny.scenes import scenes

pytest.importorskip("torch", reason="the transformers engine needs the extra 'cpu'")

MODEL = "tiny-internvl2"
TEXT = {"type": "text", "text": "Describe the image."}
BROKEN = 1_000
REASONS = {"image_unreadable", "image_truncated", "image_too_large"}


@pytest.fixture(scope="module")
def originals() -> list[bytes]:
    """Drawings, wide ones and upright ones among them, as JPEG files."""
    files = []
    for number, scene in enumerate(scenes("held_out", 8)):
        out = BytesIO()
        size = ((150, 60), (60, 150), (448, 448), (56, 56))[number % 4]
        scene.image.resize(size, Pillow.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    """A node with the tiny model on the processor; it may read the folder of pictures."""
    (tmp_path / "pictures").mkdir()
    with running_node(
        models=({"model": MODEL, "engine": "transformers"},),
        checkpoints={MODEL: CHECKPOINT},
        images={"roots": [str(tmp_path / "pictures")]},
    ) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_1000_broken_pictures_cost_no_engine_and_each_has_its_reason(
    node: RunningNode, tmp_path: Path, originals: list[bytes]
) -> None:
    """Flipped bytes, cuts, wrong sizes, other files: seeded, so that a failure can be repeated."""
    engines = node.engine_pids()
    paths = []
    for number in range(BROKEN):
        paths.append(tmp_path / "pictures" / f"{number:04}.jpg")
        paths[-1].write_bytes(mutated(originals[number % len(originals)], number))
    accounts = run(node, paths)
    assert accounts.unaccounted == 0
    assert set(accounts.failed) <= REASONS, accounts.examples
    assert accounts.answered + sum(accounts.failed.values()) == BROKEN
    # Some mutations hit pixels only, some leave no image at all: both happened.
    assert accounts.answered > BROKEN / 10
    assert sum(accounts.failed.values()) > BROKEN / 10
    assert node.engine_pids() == engines


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_of_one_of_two_engines_loses_and_doubles_no_picture(
    tmp_path: Path, originals: list[bytes]
) -> None:
    """Pictures cut for the engines, a replica killed half way: the other goes on meanwhile."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    paths = [pictures / f"{number:04}.jpg" for number in range(1_500)]
    for number, path in enumerate(paths):
        path.write_bytes(originals[number % len(originals)])
    tiling = {"tile_px": 56, "max_tiles": 4, "thumbnail": True}
    echo = {
        "model": MODEL,
        "engine": "echo",
        "replicas": 2,
        "options": {"delay_s": 0.05, "tiling": tiling},
    }
    with running_node(models=(echo,), images={"roots": [str(pictures)]}) as node:
        client = BatchClient(node.base_url)
        batch_id = submit(client, tmp_path, paths)
        wait_for(lambda: completed(client, batch_id) > 200, "the batch to be under way", 60)
        os.kill(node.engine_pids()[0], signal.SIGKILL)
        batch = client.wait(batch_id, 120)
        accounts = told(client, batch, len(paths))
    assert batch["status"] == "completed"
    assert (accounts.answered, accounts.unaccounted) == (len(paths), 0)


def run(node: RunningNode, paths: list[Path]) -> Accounts:
    """One batch with one question about each picture, to its end."""
    client = BatchClient(node.base_url)
    batch_id = submit(client, paths[0].parent, paths)
    return told(client, client.wait(batch_id, 240), len(paths))


def submit(client: BatchClient, folder: Path, paths: list[Path]) -> str:
    """Upload the questions and start a batch of them."""
    source = folder / "input.jsonl"
    source.write_text(
        "".join(
            line(f"item-{number}", [picture_of(path), TEXT], model=MODEL, max_tokens=4) + "\n"
            for number, path in enumerate(paths)
        )
    )
    return client.submit(client.upload(source))


def picture_of(path: Path) -> dict[str, object]:
    """The part of a message that shows a picture."""
    return {"type": "image_url", "image_url": {"url": str(path)}}


def completed(client: BatchClient, batch_id: str) -> int:
    """How many items have an answer."""
    return int(client.batch(batch_id)["request_counts"]["completed"])


def told(client: BatchClient, batch: dict[str, object], items: int) -> Accounts:
    """What became of every item."""
    files = (batch["output_file_id"], batch["error_file_id"])
    outputs, errors = (client.output_lines(str(name)) if name else () for name in files)
    return account(outputs, errors, items)
