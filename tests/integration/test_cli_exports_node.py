"""From a folder of pictures to its sidecars and a webdataset, by commands against a whole node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset as wds

from tests.image_sets import jpeg, tar, write
from tests.running_node import RunningNode, running_node


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the node may read images from."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def node(images: Path) -> Iterator[RunningNode]:
    with running_node(images={"roots": [str(images)]}) as running:
        yield running


def vlmq(node: RunningNode, *arguments: str) -> tuple[str, str]:
    """A command that must succeed; what it printed."""
    process = node.vlmq(*arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out, err


def caption(node: RunningNode, path: Path) -> str:
    """Caption a set and return the batch's id."""
    ask = ("--model", "echo", "--prompt", "a dish", "--watch", "--json")
    return str(json.loads(vlmq(node, "caption", str(path), *ask)[0])["id"])


def test_a_folder_gets_its_sidecars(node: RunningNode, images: Path) -> None:
    """One broken picture has none, and is named."""
    folder = images / "folder"
    for number in range(30):
        write(folder / f"{number % 3}" / f"{number}.jpg", jpeg(number))
    write(folder / "broken.jpg", b"no picture")
    batch_id = caption(node, folder)
    errors = images / "errors.jsonl"
    export = ("batch", "export", batch_id, "--format", "txt", "-o", str(folder))
    _, err = vlmq(node, *export, "--errors", str(errors))
    assert "30 written, 0 replaced, 0 there already" in err
    assert [json.loads(row)["custom_id"] for row in errors.read_text().splitlines()] == [
        "broken.jpg"
    ]
    assert {path.read_text() for path in folder.rglob("*.txt")} == {"a dish"}
    assert all(path.with_suffix(".jpg").exists() for path in folder.rglob("*.txt"))
    assert "30 there already" in vlmq(node, *export)[1]


def test_a_tar_becomes_a_webdataset(node: RunningNode, images: Path, tmp_path: Path) -> None:
    """The same pictures, now with captions."""
    pictures = [jpeg(number) for number in range(20)]
    archive = tar(images / "set.tar", [(f"{n:03d}.jpg", data) for n, data in enumerate(pictures)])
    target = tmp_path / "captioned.tar"
    vlmq(
        node, "batch", "export", caption(node, archive), "--format", "webdataset", "-o", str(target)
    )
    samples = list(wds.WebDataset(str(target), shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == pictures
    assert {sample["txt"] for sample in samples} == {b"a dish"}
