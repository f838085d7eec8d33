"""Pre-flights on a node: a few images of a set say what all of it would come to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faults.batches import results, wait_until_ended
from tests.image_sets import jpeg, write
from tests.running_node import RunningNode, running_node

IMAGES = 400


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, every fourth of them broken."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        name = folder / f"{number % 7}" / f"{number:03}.jpg"
        write(name, b"no image" if number % 4 == 0 else jpeg(number))
    return folder


@pytest.fixture(scope="module")
def node(images: Path) -> Iterator[RunningNode]:
    """A node that may read the folder."""
    with running_node(images={"roots": [str(images)]}) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def sampled(node: RunningNode, sdk: openai.OpenAI, folder: Path, **sample: Any) -> Any:
    """The batch of a sample, once it has ended."""
    body = {"model": "echo", "images": str(folder), "prompt": "a red circle", "sample": sample}
    answer = httpx.post(f"{node.base_url}/captions", json=body)
    assert answer.status_code == 200, answer.text
    return wait_until_ended(sdk, answer.json()["id"])


def names(sdk: openai.OpenAI, ended: Any) -> list[str]:
    """Which images were looked at."""
    rows = results(sdk, ended.output_file_id) + results(sdk, ended.error_file_id)
    return sorted(row["custom_id"] for row in rows)


def test_a_sample_forecasts_the_set(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """An ordinary batch of 64 images, with what all of them would take."""
    ended = sampled(node, sdk, images)
    counts, seen = ended.request_counts, ended.vlmq["preflight"]
    assert (ended.status, counts.total, counts.completed + counts.failed) == ("completed", 64, 64)
    assert (seen["images"], seen["complete"], seen["sampled"]) == (IMAGES, True, 64)
    assert seen["bad_share"] == round(counts.failed / 64, 4)
    assert 0.05 < seen["bad_share"] < 0.5
    assert seen["images_per_second"] == ended.vlmq["progress"]["items_per_second"] > 0
    assert seen["seconds"] >= IMAGES / (seen["images_per_second"] + 0.001)
    output = len(sdk.files.content(ended.output_file_id).content)
    assert seen["output_bytes"] == round(output / 64 * IMAGES)
    assert ended.vlmq["failures"] == {"image_unreadable": counts.failed}


def test_the_seed_chooses_the_sample(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """From all folders; the same seed chooses the same."""
    first = names(sdk, sampled(node, sdk, images, images=21, seed=5))
    assert len(first) == 21
    assert len({name.split("/")[0] for name in first}) >= 4
    assert first == names(sdk, sampled(node, sdk, images, images=21, seed=5))
    assert first != names(sdk, sampled(node, sdk, images, images=21, seed=6))


def test_a_set_smaller_than_the_sample_is_taken_whole(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """And one without images fails as any such job does."""
    folder = images / "few"
    for number in range(3):
        write(folder / f"{number}.jpg", jpeg(number))
    try:
        ended = sampled(node, sdk, folder)
        assert ended.vlmq["preflight"]["images"] == ended.request_counts.total == 3
        empty = images / "few" / "empty"
        empty.mkdir()
        ended = sampled(node, sdk, empty)
        assert (ended.status, ended.errors.data[0].code) == ("failed", "image_set_unreadable")
        assert ended.vlmq["preflight"] is None
    finally:
        for number in range(3):
            (folder / f"{number}.jpg").unlink()


@pytest.mark.parametrize(
    ("sample", "param"), [({"images": 65}, "sample.images"), ({"n": 1}, "sample.n")]
)
def test_a_sample_that_cannot_be_is_refused(
    node: RunningNode, images: Path, sample: dict[str, int], param: str
) -> None:
    """Before there is a batch."""
    body = {"model": "echo", "images": str(images), "prompt": "x", "sample": sample}
    answer = httpx.post(f"{node.base_url}/captions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_dry_run_shows_the_forecast_and_examples(node: RunningNode, images: Path) -> None:
    """As text, or as JSON with the batch."""
    asked = ("caption", str(images), "--model", "echo", "--prompt", "a red circle", "--dry-run")
    process = node.vlmq(*asked)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    shown = dict(line.split(":", 1) for line in out.splitlines())
    assert shown["images"].strip() == str(IMAGES)
    assert shown["sample"].strip().startswith("64 images, ")
    assert {"rate", "time", "output", "failed"} <= set(shown)
    captions = [line for line in out.splitlines() if line.endswith(".jpg: a red circle")]
    assert len(captions) == 5
    process = node.vlmq(*asked, "--json")
    out, _ = process.communicate(timeout=60)
    found = json.loads(out)
    assert (found["vlmq"]["preflight"]["images"], len(found["examples"])) == (IMAGES, 5)
