"""Exports of caption jobs: folders, archives, tables, uploads, and names that are no text."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from shared.captions import CaptionSource, ImagePlace
from shared.errors import EngineError
from shared.jobs import Batch
from shared.settings import with_overrides
from shared.stores import Stores
from tests.conftest import connected
from tests.datasets import jpeg, prepared
from tests.exports import (
    OWNER,
    Answers,
    Exporter,
    answer_chunk,
    caption,
    json_lines,
    worked_off,
)
from tests.faults.batches import ENDPOINT
from tests.image_sets import tar, write, zipped
from tests.integration.api_server import ApiServer, running_api
from tests.stored_batches import LANE, link_model, now, run_control

COUNT = 9
MEMBERS = [(f"{n // 4}/{n}.jpg", jpeg(n)) for n in range(COUNT)]
NAMES = [name for name, _ in MEMBERS]
PROMPT = "What is {it}?"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server may read images from."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    with running_api() as server:
        yield server


@pytest.fixture(scope="module")
def stores(api: ApiServer, root: Path) -> Iterator[Stores]:
    settings = with_overrides(
        api.settings,
        queue={"chunk_items": 4, "min_chunk_items": 4},
        images={"roots": [str(root)]},
    )
    with connected(settings) as found:
        yield found


@pytest.fixture
def export(api: ApiServer) -> Exporter:
    return Exporter(f"http://127.0.0.1:{api.port}")


def captioned(
    stores: Stores, *places: ImagePlace, answers: Answers = caption, **asked: Any
) -> Batch:
    """A caption job over these places that has ended."""
    return worked_off(stores, listed(stores, *places, **asked), answers)


def listed(stores: Stores, *places: ImagePlace, **asked: Any) -> Batch:
    """A caption job over these places whose chunks may be claimed."""
    link_model(stores)
    if "template" not in asked:
        asked.setdefault("prompt", PROMPT)
    batch = stores.batches.create(
        owner=OWNER,
        source=CaptionSource(images=list(places), model="echo", **asked),
        endpoint=ENDPOINT,
        completion_window="24h",
        metadata=None,
    )
    run_control(stores)
    assert now(stores, batch).total > 0, now(stores, batch)
    return now(stores, batch)


def at(path: Path, **more: Any) -> ImagePlace:
    return ImagePlace(path=str(path), **more)


def folder_of(path: Path) -> Path:
    for name, data in MEMBERS:
        write(path / name, data)
    return path


def table_of(path: Path) -> Path:
    cells = [{"bytes": data, "path": name} for name, data in MEMBERS]
    pq.write_table(pa.table({"image": cells, "said": NAMES}), path, row_group_size=3)
    return path


def samples(path: Path) -> list[dict[str, Any]]:
    return list(wds.WebDataset(str(path), shardshuffle=False))


@pytest.mark.parametrize("kind", ["folder", "glob", "tar", "zip", "table", "list"])
def test_a_webdataset_is_made_of_any_image_set(
    kind: str, stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """Image bytes are read by path or by offset in the archive, each beside its own caption."""
    place = {
        "folder": lambda: at(folder_of(root / "folder")),
        "glob": lambda: at(folder_of(root / "glob") / "*" / "*.jpg"),
        "tar": lambda: at(tar(root / "set.tar", MEMBERS)),
        "zip": lambda: at(zipped(root / "set.zip", MEMBERS)),
        "table": lambda: at(table_of(root / "set.parquet")),
        "list": lambda: at(
            write(root / "list.txt", "".join(f"{folder_of(root / 'l')}/{n}\n" for n in NAMES))
        ),
    }[kind]()
    batch = captioned(stores, place)
    assert batch.total == COUNT
    assert export(batch, "webdataset", tmp_path / "out.tar") == 0
    found = samples(tmp_path / "out.tar")
    assert [sample["jpg"] for sample in found] == [data for _, data in MEMBERS]
    assert [sample["txt"].decode() for sample in found] == [caption(n + 1) for n in range(COUNT)]


def test_an_upload_is_downloaded_once(
    stores: Stores,
    root: Path,
    export: Exporter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Or read from the copy that its owner still has."""
    archive = zipped(tmp_path / "mine.zip", MEMBERS)
    with stores.files.begin(owner=OWNER, filename="mine.zip", purpose="vision") as writer:
        writer.write(archive.read_bytes())
        upload = writer.commit()
    batch = captioned(stores, ImagePlace(file=upload.id))
    assert export(batch, "webdataset", tmp_path / "out.tar") == 0
    assert capsys.readouterr().err.count("downloading") == 1
    assert [s["jpg"] for s in samples(tmp_path / "out.tar")] == [data for _, data in MEMBERS]
    stores.files.delete(OWNER, upload.id)
    assert export(batch, "webdataset", tmp_path / "two.tar") == 0
    assert f"{COUNT} left out: {COUNT} image_not_found" in capsys.readouterr().err
    options = ("--overwrite", "--images", str(archive))
    assert export(batch, "webdataset", tmp_path / "two.tar", *options) == 0
    assert (tmp_path / "two.tar").read_bytes() == (tmp_path / "out.tar").read_bytes()


def test_an_archive_that_changed_is_not_paired_with_old_captions(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    archive = tar(root / "changing.tar", MEMBERS)
    batch = captioned(stores, at(archive))
    tar(archive, MEMBERS[:2])
    errors = tmp_path / "errors"
    assert export(batch, "webdataset", tmp_path / "out.tar", "--errors", str(errors)) == 0
    assert {row["error_code"] for row in json_lines(errors)} == {"image_changed"}
    with tarfile.open(tmp_path / "out.tar") as found:
        assert found.getnames() == []


def test_training_rows_name_images_as_the_set_does(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """Our own fine-tunes take both formats with the folder, and OpenAI's with images inside too."""
    folder = folder_of(root / "train")
    batch = captioned(stores, at(folder), prompt="Describe it.", system="Be brief.")
    for form in ("llava", "openai"):
        assert export(batch, form, tmp_path / form) == 0
        report = prepared(
            tmp_path / f"job-{form}", tmp_path / form, folder=folder, held_out_share=0
        )
        assert (report.format, report.train, report.images) == (form, COUNT, COUNT)
    [row, *_] = json.loads((tmp_path / "llava").read_text())
    assert (row["image"], row["system"]) == ("0/0.jpg", "Be brief.")
    assert row["conversations"][0]["value"] == "<image>\nDescribe it."
    assert export(batch, "openai", tmp_path / "in", "--embed-images") == 0
    report = prepared(tmp_path / "job-in", tmp_path / "in", held_out_share=0)
    assert (report.train, report.images) == (COUNT, COUNT)


def test_questions_made_of_columns_are_written_and_those_of_sidecars_asked_for(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """A wrong question is never written in silence."""
    batch = captioned(stores, at(table_of(root / "q.parquet")), template="Is it {said}?")
    assert export(batch, "openai", tmp_path / "columns", "--embed-images") == 0
    asked = [row["messages"][0]["content"][1]["text"] for row in json_lines(tmp_path / "columns")]
    assert asked == [f"Is it {name}?" for name in NAMES]
    folder = folder_of(root / "sidecars")
    for name in NAMES:
        write((folder / name).with_suffix(".tags"), "a, b")
    batch = captioned(stores, at(folder), template="Tags: {tags}")
    errors = tmp_path / "errors"
    assert export(batch, "llava", tmp_path / "l", "--errors", str(errors)) == 0
    assert {row["error_code"] for row in json_lines(errors)} == {"prompt_unknown"}
    assert export(batch, "llava", tmp_path / "p", "--prompt", "Tags?") == 0
    assert len(json.loads((tmp_path / "p").read_text())) == COUNT


def test_sidecars_lie_beside_the_images(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path, cache: str
) -> None:
    """Wherever the set began, they go where the image is; and ``datasets`` reads the texts."""
    folder = folder_of(root / "beside")
    whole = captioned(stores, at(folder))
    part = captioned(stores, at(folder / "1"))
    assert export(part, "txt", folder) == 0
    assert sorted(path.name for path in folder.rglob("*.txt")) == [
        "4.txt",
        "5.txt",
        "6.txt",
        "7.txt",
    ]
    assert all(path.parent.name == "1" for path in folder.rglob("*.txt"))
    assert export(whole, "txt", folder) == 0
    texts = [(folder / name).with_suffix(".txt").read_text() for name in NAMES]
    assert texts == [caption(n + 1) for n in range(COUNT)]
    files = [str((folder / name).with_suffix(".txt")) for name in NAMES]
    table = datasets.load_dataset(
        "text", data_files=files, split="train", sample_by="document", cache_dir=cache
    )
    assert table["text"][:] == texts


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_sidecars_of_an_archive_are_a_tree(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """Of several sets at once, too: names of the second begin with its own."""
    batch = captioned(stores, at(tar(root / "a.tar", MEMBERS)), at(folder_of(root / "b")))
    assert export(batch, "txt", tmp_path / "texts") == 0
    found = {str(p.relative_to(tmp_path / "texts")) for p in (tmp_path / "texts").rglob("*.txt")}
    stems = [name.removesuffix(".jpg") for name in NAMES]
    assert found == {f"{label}/{stem}.txt" for label in ("a.tar", "b") for stem in stems}


HOSTILE = [
    b"new\nline.jpg",
    "emoji 🐈.jpg".encode(),
    b"invalid \xff\xfe.jpg",
    b"back\\x41slash.jpg",
    b"quote\"'.jpg",
    b"x" * 250 + b".jpg",
    b" leading and trailing .jpg",
    b"two.dots.jpg",
    b"%41.jpg",
]


def test_hostile_names_of_files_go_round(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """Each caption is beside its own image, whatever bytes the name has."""
    folder = root / "hostile"
    folder.mkdir()
    for number, name in enumerate(HOSTILE):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(jpeg(number))  # noqa: PTH118
    batch = captioned(stores, at(folder))
    assert batch.total == len(HOSTILE)
    assert export(batch, "webdataset", tmp_path / "out.tar") == 0
    order = sorted(HOSTILE)
    found = samples(tmp_path / "out.tar")
    assert [sample["jpg"] for sample in found] == [jpeg(HOSTILE.index(name)) for name in order]
    assert export(batch, "txt", folder) == 0
    for number, name in enumerate(order, 1):
        stem = name.removesuffix(b".jpg")
        text = Path(os.fsdecode(os.fsencode(folder) + b"/" + stem + b".txt")).read_text()
        assert text == caption(number)
    assert export(batch, "llava", tmp_path / "l") == 0
    named = [os.fsencode(row["image"]) for row in json.loads((tmp_path / "l").read_text())]
    assert named == [name for name in order if b"\xff" not in name]
    assert export(batch, "parquet", tmp_path / "p") == 0
    assert r"invalid \xff\xfe.jpg" in pq.read_table(tmp_path / "p")["custom_id"].to_pylist()


def test_what_was_captioned_at_the_second_try_joins_the_first(
    stores: Stores, root: Path, export: Exporter
) -> None:
    """A retry is a batch of its own; its sidecars complete those of the batch before."""
    folder = folder_of(root / "again")
    batch = captioned(stores, at(folder), answers=lambda n: EngineError() if n % 2 else caption(n))
    assert export(batch, "txt", folder) == 0
    assert len(list(folder.rglob("*.txt"))) == COUNT // 2
    retry = stores.retries.create(OWNER, batch.id)
    run_control(stores)
    assert export(worked_off(stores, retry), "txt", folder) == 0
    assert len(list(folder.rglob("*.txt"))) == COUNT


def test_a_set_that_is_still_worked_on_is_exported_in_part(
    stores: Stores, root: Path, export: Exporter, tmp_path: Path
) -> None:
    """Its first chunk is done; the rows are those of the first images."""
    batch = listed(stores, at(tar(root / "running.tar", MEMBERS)), prompt=PROMPT)
    lease = stores.leases.claim(LANE, "w")
    assert lease is not None
    answer_chunk(stores, lease)
    assert export(batch, "webdataset", tmp_path / "out.tar", "--partial") == 0
    assert [sample["jpg"] for sample in samples(tmp_path / "out.tar")] == [
        data for _, data in MEMBERS[:4]
    ]
    worked_off(stores, batch)
