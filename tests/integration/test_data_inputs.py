"""A fine-tune reads its owner's files only, and everything that a job can name as its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.errors import CheckpointInvalid, DatasetInvalid
from shared.finetunes import DataSource, FinetuneSpec, Recipe
from shared.ids import new_id
from shared.jobs import Batch
from shared.shards import ShardHeader, shard_path, write_shard
from shared.stores import Stores
from tests import stored_batches
from tests.conftest import connected, store_settings
from tests.datasets import jpeg, llava, openai, rows_of, write_images
from tests.stored_batches import jsonl, upload
from workers.training.data_inputs import image_folder, prepare_job, token_counter, token_rules
from workers.training.data_report import DataReport

TINY = Path("workers/inference/tiny/checkpoint")


def finetune(training_file: str, *, owner: str = "ann", **data: Any) -> FinetuneSpec:
    source = DataSource(training_file, **{"max_bad_share": 0.5, "held_out_share": 0.2, **data})
    return FinetuneSpec(new_id("ftjob-"), owner, "tiny", 0, 7, source, Recipe(max_length=4096))


def prepare(stores: Stores, spec: FinetuneSpec) -> DataReport:
    folder = stores.layout.finetune_dir(spec.id)
    folder.mkdir(parents=True)
    return prepare_job(spec, stores, TINY, lambda: None)


def uploaded(stores: Stores, rows: list[Any], owner: str = "ann") -> str:
    content = jsonl(json.dumps(row) for row in rows)
    return upload(stores, content, owner=owner, purpose="fine-tune").id


def test_uploads_an_archive_and_single_images(own_stores: Stores, tmp_path: Path) -> None:
    from tests.unit.test_picture_archive import pack

    names = [f"{number}.jpg" for number in range(8)]
    members = [(name, jpeg(number)) for number, name in enumerate(names)]
    archive = pack(tmp_path / "a.zip", members, "zip").read_bytes()
    images = upload(own_stores, archive, purpose="user_data").id
    single = upload(own_stores, jpeg(50), purpose="vision").id
    foreign = upload(own_stores, jpeg(51), owner="bob", purpose="vision").id
    rows = [*map(llava, names), llava(single), llava(foreign), llava("/etc/hostname")]
    rows.append(llava("http://127.0.0.1:9/inside.jpg"))
    spec = finetune(uploaded(own_stores, rows), images=images)
    report = prepare(own_stores, spec)
    assert (report.rows, report.usable, report.images) == (12, 9, 9)
    assert report.dropped == {"image_not_found": 1, "image_forbidden": 2}
    assert report.exact_tokens
    folder = own_stores.layout.finetune_dir(spec.id)
    assert all(row["length"] > 0 for row in rows_of(folder, "train"))
    assert msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(report)))["rows"] == 12


def test_a_folder_below_a_root(redis_url: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    names = write_images(root / "set", 6)
    settings = store_settings(redis_url, tmp_path, images={"roots": [str(root)]})
    with connected(settings) as stores:
        rows = [*map(llava, names), llava(str(root / "set" / "0.jpg"))]
        spec = finetune(uploaded(stores, rows), images=str(root / "set"))
        assert prepare(stores, spec).usable == 7


@pytest.mark.parametrize("name", ["set", "/etc", "../root", "/root/../etc", "link", "gone", "a\0b"])
def test_only_a_folder_below_a_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    given = str(root / name) if name in {"link", "gone", "a\0b"} else name
    with pytest.raises(DatasetInvalid) as caught:
        image_folder(given, (root,))
    assert caught.value.param == "images"
    with pytest.raises(DatasetInvalid):
        image_folder(str(root), ())


@pytest.mark.parametrize("field", ["training_file", "validation_file", "images"])
def test_files_of_others_are_as_absent_as_missing_ones(own_stores: Stores, field: str) -> None:
    rows = [llava(None, number) for number in range(8)]
    mine, other = uploaded(own_stores, rows), uploaded(own_stores, rows, owner="bob")
    for file_id in (other, "file-000", "batch_000" if field == "training_file" else "file-1"):
        spec = finetune(**{"training_file": mine, field: file_id})
        with pytest.raises(DatasetInvalid) as caught:
            prepare(own_stores, spec)
        assert caught.value.param == field


def test_a_finished_batch(own_stores: Stores, tmp_path: Path) -> None:
    import base64

    urls = ["data:image/jpeg;base64," + base64.b64encode(jpeg(n)).decode() for n in range(10)]
    batch = finished_batch(own_stores, [openai(url)["messages"][:1] for url in urls])
    report = prepare(own_stores, finetune(batch.id))
    assert (report.format, report.rows, report.usable) == ("batch", 10, 9)
    assert report.dropped == {"batch_line_failed": 1}
    with pytest.raises(DatasetInvalid) as caught:
        prepare(own_stores, finetune(batch.id, owner="bob"))
    assert caught.value.param == "training_file"


def test_a_batch_that_has_not_ended_is_waited_for(own_stores: Stores) -> None:
    batch = stored_batches.planned(own_stores, 10)
    with pytest.raises(DatasetInvalid, match="is in_progress"):
        prepare(own_stores, finetune(batch.id))


def finished_batch(stores: Stores, messages: list[Any]) -> Batch:
    """A batch whose first line failed and whose others were answered."""
    stored_batches.link_model(stores)
    lines = [
        {
            "custom_id": f"id-{number}",
            "method": "POST",
            "url": stored_batches.ENDPOINT,
            "body": {"model": stored_batches.MODEL, "messages": asked},
        }
        for number, asked in enumerate(messages)
    ]
    batch = stored_batches.record(stores, jsonl(json.dumps(line) for line in lines))
    stored_batches.run_control(stores)
    lease = stored_batches.claim(stores)
    results = [result(batch, number) for number in range(len(lines))]
    errors, output = jsonl(results[:1]), jsonl(results[1:])
    header = ShardHeader(len(output), len(errors), len(lines) - 1, 1, 1, 1)
    folder = stores.batches.folder(batch.id)
    write_shard(shard_path(folder, int(lease.unit), lease.token), header, output, errors)
    assert stores.batches.committed(lease, header, [])
    stored_batches.run_control(stores)
    return stored_batches.now(stores, batch)


def result(batch: Batch, number: int) -> str:
    choice = {
        "message": {"role": "assistant", "content": f"Dish {number}"},
        "finish_reason": "stop",
    }
    body: dict[str, Any] = {"choices": [choice]} if number else {"error": {"code": "engine_error"}}
    return json.dumps(
        {
            "id": f"batch_req_{batch.id.removeprefix('batch_')}_{number + 1}",
            "custom_id": f"id-{number}",
            "response": {"status_code": 200 if number else 500, "request_id": "r", "body": body},
            "error": None,
        },
        separators=(",", ":"),
    )


class TestBases:
    def test_the_tiny_model(self) -> None:
        rules = token_rules(TINY)
        assert (rules.tiling.tile_px, rules.tiling.max_tiles, rules.family) == (56, 12, "internlm2")
        assert rules.tokens_per_tile == 4
        count = token_counter(TINY, "internlm2")
        assert count is not None
        assert 0 < count("麻婆豆腐") <= len("麻婆豆腐".encode())

    def test_a_folder_without_a_tokenizer_file_has_no_counter(self, tmp_path: Path) -> None:
        assert token_counter(tmp_path, "internlm2") is None

    def test_a_tokenizer_file_without_the_marks_of_the_family_counts_nothing(self) -> None:
        """Other files of the folder add them; counted without they would be text."""
        assert token_counter(TINY, "phi3") is None

    @pytest.mark.parametrize(
        "change",
        [
            {"llm_config": {"architectures": ["LlamaForCausalLM"]}},
            {"llm_config": {}},
            {"vision_config": None},
            {"min_dynamic_patch": "many"},
        ],
    )
    def test_another_model_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        config = json.loads((TINY / "config.json").read_bytes())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointInvalid):
            token_rules(tmp_path)
