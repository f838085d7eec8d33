"""A finished caption job as a fine-tune's data: read again as it was captioned, counted, and trained on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet
import pytest

from shared.errors import DatasetInvalid, TooManyBadRows
from shared.finetune_store import used_by
from shared.finetunes import DataSource, FinetuneSpec, FinetuneState, Recipe
from shared.ids import new_id
from tests.datasets import jpeg, llava, rows_of
from tests.faults.batches import done, wait_until_ended
from tests.finetunes import BASE, OWNER, TINY, Running, training_node
from tests.image_sets import tar, write, zipped
from tests.running_node import ECHO, wait_for
from workers.inference.tiny import CHECKPOINT
from workers.training.data_inputs import prepare_job
from workers.training.data_report import DataReport

pytestmark = pytest.mark.timeout(240)

ROLES = ("redis", "reaper", "api", "batch", "engines", "finetune")
SLOW = {"model": "slow", "engine": "echo", "options": {"delay_s": 5.0}}


@dataclass
class Site:
    """A node that captions what is below ``images``, and trains with the stand-in."""

    running: Running
    images: Path
    sdk: openai.OpenAI

    def caption(self, images: Any, **fields: Any) -> Any:
        """The batch of a caption job by ``echo``, which has just begun."""
        body = {"model": "echo", "images": images, **fields}
        if "template" not in body:
            body.setdefault("prompt", "say it")
        answer = httpx.post(f"{self.running.node.base_url}/captions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return self.sdk.batches.retrieve(answer.json()["id"])

    def captioned(self, images: Any, **fields: Any) -> Any:
        """The same, once it has ended."""
        return wait_until_ended(self.sdk, self.caption(images, **fields).id)

    def prepare(
        self,
        training: str,
        *,
        owner: str = OWNER,
        keep_going: Callable[[], None] = lambda: None,
        **data: Any,
    ) -> Prepared:
        """The data folder that a job with this data gets, as its worker makes it."""
        stores = self.running.stores
        source = DataSource(training, **{"max_bad_share": 1.0, "held_out_share": 0.0, **data})
        spec = FinetuneSpec(new_id("ftjob-"), owner, BASE, 0, 7, source, Recipe(max_length=4096))
        folder = stores.layout.finetune_dir(spec.id)
        folder.mkdir(parents=True)
        return Prepared(folder, prepare_job(spec, stores, CHECKPOINT, keep_going))

    def refused(self, training: str, **changes: Any) -> openai.APIStatusError:
        """Why a job with this data is refused."""
        with pytest.raises(openai.APIStatusError) as caught:
            self.create(training, **changes)
        return caught.value

    def create(self, training: str, vlmq: dict[str, Any] | None = None, **changes: Any) -> Any:
        """A new job."""
        return self.sdk.fine_tuning.jobs.create(
            model=BASE, training_file=training, extra_body={"vlmq": vlmq or {}}, **changes
        )

    def upload(self, name: str, content: bytes, purpose: Any) -> str:
        """A file's id."""
        return self.sdk.files.create(file=(name, content), purpose=purpose).id


@dataclass
class Prepared:
    """A data folder, and what its report says."""

    folder: Path
    report: DataReport

    def learned(self) -> dict[str, tuple[str, str]]:
        """Question and answer of each row to learn, by its picture's digest."""
        found = {}
        for row in rows_of(self.folder, "train"):
            question, answer = (turn["value"] for turn in row["conversations"])
            digest = Path(row["image"]).stem
            assert (self.folder / "data" / "images" / row["image"]).exists()
            found[digest] = (question.removeprefix("<image>").strip(), answer)
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A node with ``echo``, the tiny model and one that is slow."""
    images = tmp_path_factory.mktemp("images")
    with training_node(
        roles=ROLES, models=(ECHO, TINY, SLOW), images={"roots": [str(images)]}
    ) as running:
        yield Site(running, images, running.node.sdk(max_retries=3))


def digest(data: bytes) -> str:
    """What a picture is called in the data folder."""
    return hashlib.sha256(data).hexdigest()


def folder_of(site: Site, name: str, count: int, start: int = 0) -> Path:
    """A folder with so many pictures and, beside each, a text."""
    folder = site.images / name
    for number in range(start, start + count):
        write(folder / f"{number}.jpg", jpeg(number))
        write(folder / f"{number}.txt", f"dish {number}")
    return folder


def touched(path: Path, data: bytes) -> None:
    """Write to a file that nobody wrote to for a while."""
    path.write_bytes(data)
    later = time.time() + 60
    os.utime(path, (later, later))


# --- what is learned ------------------------------------------------------------------------------


def test_every_kind_of_place_is_read_again_with_its_own_question(site: Site) -> None:
    """Files, members, rows of tables and uploads: the picture's bytes, the question, the caption."""
    place = site.images / "kinds"
    expected = {}
    numbers = iter(range(1, 9))

    def picture(text: str) -> bytes:
        data = jpeg(next(numbers))
        expected[digest(data)] = (f"it has {text}", f"it has {text}")
        return data

    write(place / "photos" / "1.jpg", picture("a folder's"))
    write(place / "photos" / "1.txt", "a folder's\n")
    archive = tar(place / "2.tar", [("a/2.jpg", picture("a tar's")), ("a/2.txt", b"a tar's")])
    packed = zipped(place / "3.zip", [("3.jpg", picture("a zip's")), ("3.txt", b"a zip's")])
    write(place / "listed" / "4.jpg", picture("a list's"))
    write(place / "list.jsonl", json.dumps({"image": "listed/4.jpg", "txt": "a list's"}) + "\n")
    cells = [picture("a table's"), picture("another row's")]
    table = pa.table({"image": cells, "txt": ["a table's", "another row's"]})
    pyarrow.parquet.write_table(table, place / "5.parquet")
    uploaded_zip = zipped(
        place.parent / "up.zip", [("7.jpg", picture("an upload's")), ("7.txt", b"an upload's")]
    )
    uploaded = site.upload("up.zip", uploaded_zip.read_bytes(), "vision")
    ended = site.captioned(
        [
            str(place / "photos"),
            str(archive),
            str(packed),
            str(place / "list.jsonl"),
            {"path": str(place / "5.parquet"), "image_column": "image"},
            uploaded,
        ],
        template="it has {txt}",
    )
    assert (ended.request_counts.completed, ended.request_counts.failed) == (7, 0)
    made = site.prepare(ended.id)
    assert made.learned() == expected
    report = made.report
    assert (report.format, report.rows, report.train, report.images) == ("batch", 7, 7, 7)
    assert report.dropped == {}
    # One question for all, in the place of each one's own.
    asked_alike = site.prepare(ended.id, prompt="What is it?").learned()
    assert asked_alike == {key: ("What is it?", said) for key, (_, said) in expected.items()}
    # A single picture that was uploaded, which needs no place in anything.
    single = jpeg(40)
    files = [site.upload(f"{n}.jpg", jpeg(n), "vision") for n in range(40, 45)]
    made = site.prepare(site.captioned(files).id)
    assert made.learned()[digest(single)] == ("say it", "say it")


def test_what_failed_or_was_flagged_is_left_out_and_counted(site: Site) -> None:
    """Each under its reason; flagged captions only say nothing against the data."""
    folder = folder_of(site, "gate", 8)
    said = {
        "blank": "[[echo:blank]]",
        "loop": "[[echo:loop]]",
        "refusal": "[[echo:refuse]]",
        "long": " ".join(f"word{number}" for number in range(200)),
        "broken": "[[echo:error]]",
        "none": "no picture",
    }
    for number, (name, text) in enumerate(said.items(), 20):
        write(folder / f"{name}.jpg", jpeg(number) if name != "none" else b"no picture at all")
        write(folder / f"{name}.txt", text)
    gate = {"language": "en", "resamples": 0}
    ended = site.captioned(str(folder), template="{txt}", quality=gate, max_tokens=90)
    assert (ended.request_counts.completed, ended.request_counts.failed) == (12, 2)
    report = site.prepare(ended.id, max_bad_share=0.15).report
    assert (report.rows, report.train) == (14, 8)
    assert report.dropped == {
        "batch_line_failed": 2,
        "flagged_empty": 1,
        "flagged_repeating": 1,
        "flagged_refusing": 1,
        "flagged_truncated": 1,
    }
    flagged = next(row for row in report.bad_rows if row.reason == "flagged_repeating")
    assert (flagged.file, flagged.field, "keep_flagged" in flagged.message) == (
        "training", "quality", True
    )  # fmt: skip
    with pytest.raises(TooManyBadRows, match=r"2 of 14 rows.*2 batch_line_failed"):
        site.prepare(ended.id, max_bad_share=0.1)
    # Kept, only what nothing could be learned from is left out.
    kept = site.prepare(ended.id, keep_flagged=True).report
    assert kept.train == 10
    assert kept.dropped == {"batch_line_failed": 2, "empty_answer": 1, "answer_cut": 1}
    job = site.create(ended.id, vlmq={"keep_flagged": True, "max_bad_share": 0.3})
    assert job.to_dict()["vlmq"]["data"]["keep_flagged"]
    site.sdk.fine_tuning.jobs.cancel(job.id)


def test_a_batch_may_also_be_what_is_held_out(site: Site) -> None:
    """Its rows are the ones kept from training, beside a file or another batch."""
    first = site.captioned(str(folder_of(site, "side-a", 6, start=60)))
    second = site.captioned(str(folder_of(site, "side-b", 4, start=64)))
    made = site.prepare(first.id, validation_file=second.id)
    # Two pictures are in both: they are held out.
    assert (made.report.train, made.report.held_out) == (4, 4)
    assert made.report.dropped == {"in_validation_file": 2}
    rows = [llava(None, number) for number in range(6)]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    uploaded = site.upload("rows.jsonl", content, "fine-tune")
    mixed = site.prepare(uploaded, validation_file=second.id).report
    assert (mixed.format, mixed.train, mixed.held_out) == ("llava", 6, 4)


def test_stopped_jobs_and_retries_are_data_as_well(site: Site) -> None:
    """What was done before a job was cancelled; and of a retry the pictures that failed at first."""
    folder = folder_of(site, "stopped", 6, start=230)
    for number in range(230, 234):
        write(folder / f"{number}.txt", "[[echo:error]]")
    first = site.captioned(str(folder), template="{txt}", model="echo")
    assert first.request_counts.failed == 4
    for number in range(230, 234):
        write(folder / f"{number}.txt", f"dish {number}")
    answer = httpx.post(f"{site.running.node.base_url}/batches/{first.id}/retry", timeout=30)
    again = wait_until_ended(site.sdk, answer.json()["id"])
    learned = site.prepare(again.id).learned()
    assert learned == {
        digest(jpeg(number)): (f"dish {number}", f"dish {number}") for number in range(230, 234)
    }
    many = folder_of(site, "many", 900, start=1000)
    stopped = site.caption(str(many))
    wait_for(lambda: done(site.sdk.batches.retrieve(stopped.id)) > 0, "a part", 60)
    site.sdk.batches.cancel(stopped.id)
    stopped = wait_until_ended(site.sdk, stopped.id)
    counts = stopped.request_counts
    made = site.prepare(stopped.id).report
    assert (made.rows, made.train) == (counts.total, counts.completed)
    assert made.dropped == ({"batch_line_failed": counts.failed} if counts.failed else {})


def test_the_command_line_takes_a_batchs_id(site: Site) -> None:
    """With options under their names; a job that was asked for so is recorded so."""
    ended = site.captioned(str(folder_of(site, "command", 6, start=240)))
    command = site.running.node.vlmq(
        *("finetune", "create", "--model", BASE, "--data", ended.id, "--json"),
        *("--set", "prompt=What is it?"),
    )
    said, complaint = command.communicate(timeout=60)
    assert command.returncode == 0, complaint
    job = json.loads(said)
    asked = job["vlmq"]["data"]
    assert (job["training_file"], asked["prompt"], asked["keep_flagged"]) == (
        ended.id, "What is it?", False
    )  # fmt: skip
    site.sdk.fine_tuning.jobs.cancel(job["id"])


# --- what is not as it was ------------------------------------------------------------------------


def test_a_picture_that_is_not_what_was_captioned_is_not_learned(site: Site) -> None:
    """Changed, gone, no longer reachable; in a folder, an archive or a table."""
    folder = folder_of(site, "changing", 8, start=100)
    archive = tar(site.images / "changing.tar", [(f"{n}.jpg", jpeg(n)) for n in (120, 121)])
    steady = tar(site.images / "steady.tar", [("130.jpg", jpeg(130))])
    table = site.images / "changing.parquet"
    pyarrow.parquet.write_table(pa.table({"image": [jpeg(140)]}), table)
    ended = site.captioned([str(folder), str(archive), str(steady), str(table)])
    assert ended.request_counts.failed == 0
    touched(folder / "100.jpg", jpeg(99))
    (folder / "101.jpg").unlink()
    (folder / "102.jpg").unlink()
    (folder / "102.jpg").symlink_to("/etc/hostname")
    touched(archive, archive.read_bytes())
    touched(table, table.read_bytes())
    report = site.prepare(ended.id).report
    assert report.dropped == {"image_changed": 4, "image_not_found": 1, "image_forbidden": 1}
    assert report.train == 6


def test_a_question_that_is_not_known_any_more_is_not_made_up(site: Site) -> None:
    """A text beside the image that is gone or was written since; one question for all helps."""
    folder = folder_of(site, "texts", 7, start=150)
    ended = site.captioned(str(folder), template="say {txt}")
    (folder / "150.txt").unlink()
    touched(folder / "151.txt", b"a caption that somebody put here")
    made = site.prepare(ended.id)
    assert made.report.dropped == {"text_missing": 2}
    assert all("prompt" in row.message for row in made.report.bad_rows)
    assert ("say dish 152", "say dish 152") in made.learned().values()
    learned = site.prepare(ended.id, prompt="What is it?").learned()
    assert learned[digest(jpeg(150))] == ("What is it?", "say dish 150")


def test_results_that_are_deleted_meanwhile_end_it_clearly(site: Site) -> None:
    """Before it begins or in the middle: by name, and with nothing left behind."""
    stores = site.running.stores
    # A sample has chunks of four.
    folder = str(folder_of(site, "deleted", 12, start=170))
    ended = site.captioned(folder, sample={"images": 12})
    seen = 0

    def delete_in_the_middle() -> None:
        nonlocal seen
        seen += 1
        if seen == 6:
            stores.files.discard(stores.files.get(OWNER, ended.output_file_id))

    with pytest.raises(DatasetInvalid, match=f"{ended.id}.*{ended.output_file_id}") as caught:
        site.prepare(ended.id, keep_going=delete_in_the_middle)
    assert caught.value.param == "training_file"
    with pytest.raises(DatasetInvalid, match=f"{ended.id}.*is gone") as caught:
        site.prepare(ended.id)
    assert caught.value.param == "training_file"
    left = [path.name for path in stores.layout.finetunes.glob("*/*") if "data" in path.name]
    assert not [name for name in left if name.startswith(".")]


def test_somebody_elses_batch_is_as_absent_as_a_missing_one(site: Site) -> None:
    """Also for the worker, which looks again."""
    ended = site.captioned(str(folder_of(site, "mine", 4, start=190)))
    for name, owner in ((ended.id, "bob"), ("batch_0123456789abcdef01234567", OWNER)):
        with pytest.raises(DatasetInvalid) as caught:
            site.prepare(name, owner=owner)
        assert caught.value.param == "training_file"


# --- over HTTP ------------------------------------------------------------------------------------


def test_what_cannot_be_learned_from_is_refused_with_what_to_do(site: Site) -> None:
    """Before the job exists, by the name of the field."""
    folder = folder_of(site, "refused", 4, start=200)
    running = site.caption(str(folder), model="slow")
    early = site.refused(running.id)
    assert (early.param, "has not ended" in early.message) == ("training_file", True)
    assert site.refused(running.id, validation_file=running.id).param == "training_file"
    site.sdk.batches.cancel(running.id)
    wait_until_ended(site.sdk, running.id)
    write(site.images / "none" / "1.jpg", b"no picture")
    failed = site.captioned(str(site.images / "none"))
    assert "has no answers" in site.refused(failed.id).message
    write(folder / "broken.jpg", b"no picture")
    ended = site.captioned(str(folder))
    of_errors = site.refused(ended.error_file_id)
    assert (of_errors.param, "name the batch" in of_errors.message) == ("training_file", True)
    for options, param in (
        ({"keep_flagged": True}, "vlmq.keep_flagged"),
        ({"images": str(folder)}, "vlmq.images"),
        ({"format": "llava"}, "vlmq.format"),
        ({"prompt": ""}, "vlmq.prompt"),
    ):
        assert site.refused(ended.id, vlmq=options).param == param
        if param == "vlmq.format":
            assert site.refused(ended.output_file_id, vlmq=options).param == param
    rows = site.upload("rows.jsonl", b'{"messages": []}\n', "fine-tune")
    assert site.refused(rows, vlmq={"prompt": "What is it?"}).param == "vlmq.prompt"
    assert site.refused(rows, vlmq={"format": "batch"}).param == "vlmq.format"


def test_what_a_job_learns_from_is_kept_until_it_has_ended(site: Site) -> None:
    """The batch, its results and uploads; once an upload is gone the batch is refused."""
    archive = zipped(site.images / "kept.zip", [(f"{n}.jpg", jpeg(n)) for n in range(210, 216)])
    uploaded = site.upload("kept.zip", archive.read_bytes(), "vision")
    write(site.images / "kept" / "1.jpg", b"no picture")
    ended = site.captioned([uploaded, str(site.images / "kept")])
    kept = {ended.id, uploaded, ended.output_file_id, ended.error_file_id}
    for data in (DataSource(ended.id), DataSource("file-1", ended.id)):
        spec = FinetuneSpec(new_id("ftjob-"), OWNER, BASE, 0, 7, data)
        assert kept <= set(used_by(spec, site.running.stores.layout))
    site.sdk.files.delete(uploaded)
    gone = site.refused(ended.id)
    assert (gone.param, uploaded in gone.message) == ("training_file", True)


def test_from_a_folder_and_a_tar_to_a_model_that_answers(site: Site) -> None:
    """Captioned, named by the output file, verified, trained on, compared and registered."""
    folder = folder_of(site, "whole", 20, start=220)
    members = [(f"{n}.jpg", jpeg(n)) for n in range(300, 312)]
    archive = tar(site.images / "whole.tar", members)
    write(folder / "broken.jpg", b"no picture")
    ended = site.captioned([str(folder), str(archive)], prompt="Describe the image.")
    assert (ended.request_counts.completed, ended.request_counts.failed) == (32, 1)
    job = site.create(
        ended.output_file_id, vlmq={"max_bad_share": 0.1, "held_out_share": 0.25, "save_every": 5}
    )
    assert job.training_file == ended.id
    done = site.running.wait_state(job.id, FinetuneState.SUCCEEDED, limit_s=120)
    report = done.data_report
    assert (report["format"], report["rows"], report["images"]) == ("batch", 33, 32)
    assert (report["train"], report["held_out"]) == (24, 8)
    assert report["dropped"] == {"batch_line_failed": 1}
    compared = (site.running.stores.finetunes.path(job.id) / "comparison.jsonl").read_text()
    rows = [json.loads(line) for line in compared.splitlines()]
    assert {(row["question"], row["reference"]) for row in rows} == {
        ("Describe the image.", "Describe the image.")
    }
    assert site.sdk.models.retrieve(done.fine_tuned_model or "").id == done.fine_tuned_model
