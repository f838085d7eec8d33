"""Exports of a batch's results, over a real API, read back with the libraries that they are for."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx
import pandas as pd
import pytest
import webdataset as wds

from shared.errors import EngineError
from shared.jobs import Batch
from shared.settings import with_overrides
from shared.stores import Stores
from tests.conftest import connected
from tests.datasets import jpeg, prepared, rows_of
from tests.exports import (
    Answer,
    Exporter,
    answer_chunk,
    answered,
    asking,
    caption,
    inline,
    json_lines,
    planned,
    worked_off,
)
from tests.faults.batches import line
from tests.integration.api_server import ApiServer, running_api
from tests.stored_batches import LANE

COUNT = 12
FAILED = {5, 10}
GOOD = [number for number in range(1, COUNT + 1) if number not in FAILED]


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    """One API for all tests; batches are worked on by the tests themselves."""
    with running_api() as server:
        yield server


@pytest.fixture(scope="module")
def stores(api: ApiServer) -> Iterator[Stores]:
    queue = {"chunk_items": 4, "min_chunk_items": 4}
    with connected(with_overrides(api.settings, queue=queue)) as found:
        yield found


@pytest.fixture
def export(api: ApiServer) -> Exporter:
    return Exporter(f"http://127.0.0.1:{api.port}")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """Where ``datasets`` keeps its tables."""
    return str(tmp_path / "cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of different photographs, ``1.jpg`` to ``12.jpg``."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(1, COUNT + 1):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


@pytest.fixture(scope="module")
def batch(stores: Stores, photos: Path) -> Batch:
    """Asked about each photograph by its path; two failed."""
    lines = [asking(f"{n}.jpg", f"{photos}/{n}.jpg") for n in range(1, COUNT + 1)]
    return answered(stores, lines, mixed)


def mixed(number: int) -> Answer:
    """Every fifth line fails."""
    return EngineError() if number % 5 == 0 else caption(number)


def rows(api: ApiServer, batch_id: str, **query: Any) -> httpx.Response:
    return httpx.get(f"{api.base_url}/batches/{batch_id}/rows", params=query)


def load_path(address: str) -> bytes:
    """Images as a fine-tune reads those of a root."""
    return Path(address).read_bytes()


# --- rows over HTTP ---------------------------------------------------------------------------


def test_rows_are_flat_and_in_order(api: ApiServer, stores: Stores) -> None:
    """Each line with what was asked, page by page, failed ones among them."""
    lines = [asking(f"{n}.jpg", f"/photos/{n}.jpg") for n in range(1, 8)]
    lines[2] = asking("inline", inline(jpeg(1)))
    lines[3] = line("text", "say 4")
    found, after = [], "0"
    batch = answered(stores, lines, mixed)
    while True:
        page = rows(api, batch.id, after=after, limit=3)
        found += [json.loads(text) for text in page.text.splitlines()]
        after = page.headers["vlmq-next-after"]
        if page.headers["vlmq-complete"] == "true":
            break
    assert [row["line"] for row in found] == list(range(1, 8))
    assert found[0] == {
        "line": 1,
        "custom_id": "1.jpg",
        "image": "/photos/1.jpg",
        "prompt": "What is it?",
        "caption": caption(1),
        "model": "echo",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "error_code": None,
        "error": None,
    }
    assert found[2]["image"] is None
    assert found[3]["prompt"] == "say 4"
    assert (found[4]["caption"], found[4]["error_code"]) == (None, "engine_error")
    assert found[4]["image"] == "/photos/5.jpg"
    [asked] = rows(api, batch.id, after=2, limit=1, messages="true").json()["messages"]
    assert asked["content"][0]["image_url"]["url"] == inline(jpeg(1))


def test_rows_of_lines_that_no_request_is_in(api: ApiServer, stores: Stores) -> None:
    """Blank lines count and have no row; one that is no JSON has its error and nothing else."""
    lines = ["", asking("a", "/a.jpg"), "   ", "no json", asking("b", "/b.jpg")]
    batch = answered(stores, lines, mixed)
    found = [json.loads(text) for text in rows(api, batch.id).text.splitlines()]
    assert [(row["line"], row["custom_id"], row["image"]) for row in found] == [
        (2, "a", "/a.jpg"),
        (4, None, None),
        (5, "b", "/b.jpg"),
    ]


def test_rows_outlive_their_input(api: ApiServer, stores: Stores) -> None:
    """Without the input file captions are still there; what needs the questions says why not."""
    batch = answered(stores, [asking("a", "/a.jpg")])
    assert batch.input_file_id is not None
    stores.files.delete(batch.owner, batch.input_file_id)
    row = rows(api, batch.id).json()
    assert (row["caption"], row["image"], row["prompt"]) == (caption(1), None, None)
    refused = rows(api, batch.id, messages="true")
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "input_file_id"


@pytest.mark.parametrize(("name", "value"), [("after", "x"), ("limit", "0"), ("messages", "maybe")])
def test_rows_refuse_what_is_asked_wrongly(
    api: ApiServer, batch: Batch, name: str, value: str
) -> None:
    answer = rows(api, batch.id, **{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


# --- tables -----------------------------------------------------------------------------------


def test_jsonl_loads_in_pandas_and_datasets(
    batch: Batch, photos: Path, export: Exporter, tmp_path: Path, cache: str
) -> None:
    """Failed lines are in it, with their reason."""
    target = tmp_path / "captions.jsonl"
    assert export(batch, "jsonl", target) == 0
    table = datasets.load_dataset("json", data_files=str(target), split="train", cache_dir=cache)
    assert_flat(table.to_pandas(), photos)
    assert_flat(pd.read_json(target, lines=True), photos)


def test_parquet_loads_in_pandas_and_datasets(
    batch: Batch, photos: Path, export: Exporter, tmp_path: Path, cache: str
) -> None:
    target = tmp_path / "captions.parquet"
    assert export(batch, "parquet", target) == 0
    table = datasets.load_dataset("parquet", data_files=str(target), split="train", cache_dir=cache)
    assert_flat(table.to_pandas(), photos)
    assert_flat(pd.read_parquet(target), photos)


def assert_flat(table: pd.DataFrame, photos: Path) -> None:
    """The rows of the batch, one column per field."""
    assert list(table["line"]) == list(range(1, COUNT + 1))
    assert list(table["image"]) == [f"{photos}/{n}.jpg" for n in range(1, COUNT + 1)]
    good = table[table["error_code"].isna()]
    assert list(good["caption"]) == [caption(number) for number in GOOD]
    assert set(good["finish_reason"]) == {"stop"}
    assert set(good["completion_tokens"]) == {3}
    failed = table[table["caption"].isna()]
    assert set(failed["line"]) == FAILED
    assert set(failed["error_code"]) == {"engine_error"}


def test_a_table_of_nothing_still_has_its_columns(
    stores: Stores, export: Exporter, tmp_path: Path
) -> None:
    """A batch that failed as a whole has no rows."""
    batch = planned(stores, ["no json"])
    assert batch.state == "failed"
    assert export(batch, "parquet", tmp_path / "p") == 0
    table = pd.read_parquet(tmp_path / "p")
    assert len(table) == 0
    assert "caption" in table.columns
    assert export(batch, "llava", tmp_path / "l") == 0
    assert json.loads((tmp_path / "l").read_text()) == []


# --- webdataset -------------------------------------------------------------------------------


def test_webdataset_reads_images_with_their_captions(
    batch: Batch, photos: Path, export: Exporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image bytes, caption and row under one key; failed lines are left out and listed."""
    target, errors = tmp_path / "set.tar", tmp_path / "errors.jsonl"
    assert export(batch, "webdataset", target, "--errors", str(errors)) == 0
    samples = list(wds.WebDataset(str(target), shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [caption(n) for n in GOOD]
    assert [sample["jpg"] for sample in samples] == [jpeg(n) for n in GOOD]
    assert [json.loads(s["json"])["image"] for s in samples] == [f"{photos}/{n}.jpg" for n in GOOD]
    decoded = list(wds.WebDataset(str(target), shardshuffle=False).decode("pil"))
    assert [sample["jpg"].size for sample in decoded] == [(48, 48)] * len(GOOD)
    assert {row["line"] for row in json_lines(errors)} == FAILED
    assert "2 left out: 2 engine_error" in capsys.readouterr().err


def test_webdataset_loads_in_datasets(
    batch: Batch, export: Exporter, tmp_path: Path, cache: str
) -> None:
    target = tmp_path / "set.tar"
    assert export(batch, "webdataset", target) == 0
    table = datasets.load_dataset(
        "webdataset", data_files=str(target), split="train", cache_dir=cache
    )
    assert [row["txt"] for row in table] == [caption(n) for n in GOOD]
    assert table[0]["jpg"].size == (48, 48)
    assert table[0]["json"]["custom_id"] == "1.jpg"


def test_webdataset_in_shards(batch: Batch, export: Exporter, tmp_path: Path) -> None:
    """All of them appear; an earlier set is not mixed with a new one."""
    target = tmp_path / "set.tar"
    assert export(batch, "webdataset", target, "--shard-items", "4") == 0
    assert names_in(tmp_path) == [f"set-00000{n}.tar" for n in range(3)]
    urls = f"{tmp_path}/set-{{000000..000002}}.tar"
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == [caption(n) for n in GOOD]
    assert export(batch, "webdataset", target, "--shard-items", "9", "--overwrite") == 1
    assert names_in(tmp_path) == [f"set-00000{n}.tar" for n in range(3)]


def test_no_name_breaks_a_webdataset(stores: Stores, export: Exporter, tmp_path: Path) -> None:
    """Keys are line numbers: dots, slashes, newlines and twins are as good as any name."""
    names = ["../up.jpg", "/etc/passwd", "a.b.c.jpg", "a\nb", "🐈" * 60, "__x__", ".", "d/", "d/ "]
    lines = [asking(name, inline(jpeg(number))) for number, name in enumerate(names, 1)]
    batch = answered(stores, lines)
    assert export(batch, "webdataset", tmp_path / "set.tar") == 0
    samples = list(wds.WebDataset(str(tmp_path / "set.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["custom_id"] for sample in samples] == names
    assert [sample["jpg"] for sample in samples] == [jpeg(n) for n in range(1, len(names) + 1)]


def test_images_that_cannot_be_had_are_left_out_with_reasons(
    stores: Stores, export: Exporter, tmp_path: Path
) -> None:
    """A missing file, a folder, a pipe, what is no image, the web; an upload and a PNG are taken."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "text.jpg").write_text("no image")
    (folder / "real.png").write_bytes(jpeg(1, format="PNG"))
    with stores.files.begin(owner="local", filename="x.jpg", purpose="vision") as writer:
        writer.write(jpeg(2))
        upload = writer.commit()
    urls = {
        f"{folder}/none.jpg": "image_not_found",
        f"{folder}": "image_not_found",
        f"{folder}/pipe.jpg": "image_not_found",
        f"{folder}/text.jpg": "unsupported_image",
        "https://example.org/x.jpg": "image_on_the_web",
        "file-000000000000000000000000": "image_not_found",
        f"file://{folder}/real.png": None,
        upload.id: None,
    }
    lines = [asking(f"item-{n}", url) for n, url in enumerate(urls)]
    batch = answered(stores, [*lines, line("text", "no image at all")])
    errors = tmp_path / "errors"
    assert export(batch, "webdataset", tmp_path / "set.tar", "--errors", str(errors)) == 0
    expected = [reason for reason in urls.values() if reason] + ["no_image"]
    assert [row["error_code"] for row in json_lines(errors)] == expected
    samples = list(wds.WebDataset(str(tmp_path / "set.tar"), shardshuffle=False))
    assert [sorted(key for key in s if not key.startswith("__")) for s in samples] == [
        ["json", "png", "txt"],
        ["jpg", "json", "txt"],
    ]


def test_images_are_found_below_another_folder(
    stores: Stores, photos: Path, export: Exporter, tmp_path: Path
) -> None:
    """``--images`` where this machine has them elsewhere than the server."""
    lines = [asking(f"{n}.jpg", f"/mnt/server/{n}.jpg") for n in range(1, 4)]
    lines.append(asking("../secret.jpg", "/mnt/server/secret.jpg"))
    (photos.parent / "secret.jpg").write_bytes(jpeg(99))
    batch = answered(stores, lines)
    target = tmp_path / "set.tar"
    assert export(batch, "webdataset", target, "--images", str(photos)) == 0
    samples = list(wds.WebDataset(str(target), shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [jpeg(n) for n in range(1, 4)]


# --- training ---------------------------------------------------------------------------------


def test_openai_lines_are_accepted_by_our_own_fine_tunes(
    batch: Batch, photos: Path, export: Exporter, tmp_path: Path, cache: str
) -> None:
    """And load in ``datasets``; the images are read from where they lie."""
    target = tmp_path / "train.jsonl"
    assert export(batch, "openai", target) == 0
    report = prepared(tmp_path / "job", target, load=load_path, held_out_share=0.0)
    assert (report.format, report.train, report.dropped) == ("openai", len(GOOD), {})
    said = [row["conversations"] for row in rows_of(tmp_path / "job", "train")]
    assert [turns[1]["value"] for turns in said] == [caption(n) for n in GOOD]
    assert {turns[0]["value"] for turns in said} == {"<image>\nWhat is it?"}
    table = datasets.load_dataset("json", data_files=str(target), split="train", cache_dir=cache)
    [question, answer] = table[0]["messages"]
    assert question["content"][0]["image_url"]["url"] == f"{photos}/1.jpg"
    assert answer["content"][0]["text"] == caption(1)
    assert len(pd.read_json(target, lines=True)) == len(GOOD)


def test_openai_lines_hold_their_images_if_asked_to(
    batch: Batch, export: Exporter, tmp_path: Path
) -> None:
    """As OpenAI itself wants them, and our fine-tunes without any folder."""
    target = tmp_path / "train.jsonl"
    assert export(batch, "openai", target, "--embed-images", "--prompt", "Describe it.") == 0
    report = prepared(tmp_path / "job", target, held_out_share=0.0)
    assert (report.train, report.images) == (len(GOOD), len(GOOD))
    first = json_lines(target)[0]["messages"][0]["content"]
    assert first[0]["image_url"]["url"] == inline(jpeg(1))
    assert first[1]["text"] == "Describe it."


def test_llava_rows_are_accepted_by_our_own_fine_tunes(
    batch: Batch, photos: Path, export: Exporter, tmp_path: Path, cache: str
) -> None:
    target = tmp_path / "train.json"
    assert export(batch, "llava", target) == 0
    report = prepared(tmp_path / "job", target, load=load_path, held_out_share=0.0)
    assert (report.format, report.train, report.dropped) == ("llava", len(GOOD), {})
    said = [row["conversations"] for row in rows_of(tmp_path / "job", "train")]
    assert [turns[1]["value"] for turns in said] == [caption(n) for n in GOOD]
    table = datasets.load_dataset("json", data_files=str(target), split="train", cache_dir=cache)
    assert table[0]["image"] == f"{photos}/1.jpg"
    assert table[0]["conversations"][0] == {"from": "human", "value": "<image>\nWhat is it?"}
    assert list(pd.read_json(target)["id"]) == [f"{n}.jpg" for n in GOOD]


def test_what_should_not_be_learned_is_left_out(
    stores: Stores, export: Exporter, tmp_path: Path
) -> None:
    """Answers cut at the limit or empty, and what LLaVA's format cannot say."""
    lines = [asking(str(n), "/a.jpg") for n in range(1, 6)]
    lines[3] = asking("inline", inline(jpeg(1)))
    two = [{"type": "image_url", "image_url": {"url": "/a.jpg"}}] * 2
    lines[4] = line("two", [*two, {"type": "text", "text": "Which?"}])
    texts = ["good", "half [cut]", "  ", "inline", "both"]
    batch = answered(
        stores, [*lines, asking("tag", "/a.jpg")], lambda n: [*texts, "<image>"][n - 1]
    )
    errors = tmp_path / "errors"
    assert export(batch, "llava", tmp_path / "l", "--errors", str(errors)) == 0
    assert [row["error_code"] for row in json_lines(errors)] == [
        "answer_cut",
        "empty_answer",
        "image_in_request",
        "several_images",
        "image_tag",
    ]
    [row] = json.loads((tmp_path / "l").read_text())
    assert row["conversations"][1]["value"] == "good"
    assert export(batch, "openai", tmp_path / "o", "--errors", str(errors), "--overwrite") == 0
    assert [row["error_code"] for row in json_lines(errors)] == ["answer_cut", "empty_answer"]


def test_a_conversation_is_kept_whole(stores: Stores, export: Exporter, tmp_path: Path) -> None:
    """System prompt and earlier turns included."""
    asked = json.loads(asking("a", "/a.jpg"))
    [question] = asked["body"]["messages"]
    asked["body"]["messages"] = [
        {"role": "system", "content": "Be brief."},
        question,
        {"role": "assistant", "content": "A dish."},
        {"role": "user", "content": "Which?"},
    ]
    batch = answered(stores, [json.dumps(asked)])
    assert export(batch, "openai", tmp_path / "o") == 0
    [row] = json_lines(tmp_path / "o")
    assert [message["role"] for message in row["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert export(batch, "llava", tmp_path / "l", "--prompt", "What sort?") == 0
    [row] = json.loads((tmp_path / "l").read_text())
    assert row["system"] == "Be brief."
    assert [turn["value"] for turn in row["conversations"]] == [
        "<image>\nWhat is it?",
        "A dish.",
        "What sort?",
        caption(1),
    ]


# --- files ------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """Everything in it, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("form", ["jsonl", "parquet", "llava", "openai", "webdataset"])
def test_what_is_there_is_kept_unless_told_otherwise(
    form: str, batch: Batch, export: Exporter, tmp_path: Path
) -> None:
    target = tmp_path / "mine"
    target.write_text("mine")
    assert export(batch, form, target) == 1
    assert target.read_text() == "mine"
    assert export(batch, form, target, "--overwrite") == 0
    assert target.read_bytes() != b"mine"
    assert names_in(tmp_path) == ["mine"]


def test_a_link_is_replaced_and_not_followed(
    batch: Batch, export: Exporter, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert export(batch, "jsonl", tmp_path / "link") == 1
    assert export(batch, "jsonl", tmp_path / "link", "--overwrite") == 0
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_running_batch_is_exported_only_on_purpose(
    stores: Stores, export: Exporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else half a set would look like all of it."""
    lines = [asking(str(n), f"/{n}.jpg") for n in range(12)]
    batch = planned(stores, lines)
    lease = stores.leases.claim(LANE, "w")
    assert lease is not None
    answer_chunk(stores, lease)
    assert export(batch, "jsonl", tmp_path / "out") == 1
    assert "--partial" in capsys.readouterr().err
    assert names_in(tmp_path) == []
    assert export(batch, "jsonl", tmp_path / "out", "--partial") == 0
    assert "still runs" in capsys.readouterr().err
    assert [row["line"] for row in json_lines(tmp_path / "out")] == [1, 2, 3, 4]
    worked_off(stores, batch)
    assert export(batch, "jsonl", tmp_path / "all") == 0
    assert len(json_lines(tmp_path / "all")) == len(lines)


@pytest.mark.parametrize(
    ("form", "option"),
    [
        ("jsonl", ("--prompt", "x")),
        ("llava", ("--embed-images",)),
        ("parquet", ("--shard-items", "3")),
        ("openai", ("--images", "/tmp")),
        ("txt", ("--prompt", "x")),
    ],
)
def test_options_without_effect_are_refused(
    form: str, option: tuple[str, ...], batch: Batch, export: Exporter, tmp_path: Path
) -> None:
    assert export(batch, form, tmp_path / "out", *option) == 2
    assert names_in(tmp_path) == []


def test_parquet_says_what_to_install(
    batch: Batch,
    export: Exporter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is read."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert export(batch, "parquet", tmp_path / "out") == 1
    assert "pip install 'vlmq[parquet]'" in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_a_tar_is_one_that_tar_reads(batch: Batch, export: Exporter, tmp_path: Path) -> None:
    """With members that are the same whenever and by whomever they were made."""
    for name in ("one", "two"):
        assert export(batch, "webdataset", tmp_path / name) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "one").read_bytes())) as archive:
        assert len(archive.getnames()) == 3 * len(GOOD)
