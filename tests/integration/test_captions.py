"""Image sets as caption jobs on a node: what is listed, in which order, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faults.batches import results, wait_until_ended
from tests.integration.test_image_batches import jpeg
from tests.running_node import RunningNode, running_node


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the node may read images from."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def node(images: Path) -> Iterator[RunningNode]:
    """A node that serves ``echo`` and may read the images."""
    with running_node(images={"roots": [str(images)]}) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def write(path: Path, data: bytes = jpeg(1)) -> Path:
    """A file, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def caption(node: RunningNode, images: Any, **fields: Any) -> dict[str, Any]:
    """``POST /v1/captions``, which must be accepted."""
    body = {"model": "echo", "images": images, **fields}
    if "template" not in body:
        body.setdefault("prompt", "say it")
    answer = httpx.post(f"{node.base_url}/captions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def finished(node: RunningNode, sdk: openai.OpenAI, batch_id: str) -> Any:
    """The batch once it has ended."""
    return wait_until_ended(sdk, batch_id)


def names(sdk: openai.OpenAI, batch: Any) -> list[str]:
    """The names of the images that were captioned, in the order of the output."""
    return [row["custom_id"] for row in results(sdk, batch.output_file_id)]


def test_a_folder_is_captioned_in_the_order_of_its_names(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Folders within it, too; what is no image is passed over."""
    folder = images / "order"
    for name in ("b/2.png", "b/10.JPG", "a.jpg", "c.webp", "b.jpeg", "b/c/1.jpg"):
        write(folder / name)
    for name in ("notes.txt", ".hidden.jpg", ".git/1.jpg", "b/2.txt", "set.zip"):
        write(folder / name)
    made = caption(node, str(folder))
    assert (made["object"], made["input_file_id"]) == ("batch", None)
    assert made["endpoint"] == "/v1/chat/completions"
    ended = finished(node, sdk, made["id"])
    assert ended.status == "completed"
    listed = ["a.jpg", "b/10.JPG", "b/2.png", "b/c/1.jpg", "b.jpeg", "c.webp"]
    assert names(sdk, ended) == listed
    assert ended.vlmq["listing"] == {"complete": True, "images": len(listed)}
    [first, *_] = results(sdk, ended.output_file_id)
    body = first["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "say it"
    assert body["usage"]["prompt_tokens"] == 256 + 2
