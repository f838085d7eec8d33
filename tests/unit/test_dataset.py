"""A fine-tune's data folder: whole or absent, every image decoded, every dropped row accounted for."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.errors import (
    DatasetInvalid,
    ImageNotFound,
    LeaseLost,
    StorageFailed,
    StorageFull,
    TooFewRows,
    TooManyBadRows,
    TooManyRows,
)
from shared.settings import ImageSettings
from tests.datasets import (
    jpeg,
    llava,
    openai,
    prepared,
    rows_of,
    write_images,
    write_lines,
)
from workers.training.batch_rows import BatchFiles
from workers.training.data_report import BadRow
from workers.training.dataset import read_report


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_images(folder, 12)
    return folder


def named(count: int = 12) -> list[dict[str, Any]]:
    return [llava(f"{number}.jpg", number) for number in range(count)]


def packed(tmp_path: Path, folder: Path, arcname: str = ".") -> Path:
    path = tmp_path / "archive"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname)
    return path


def inline(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def with_orientation(data: bytes, value: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, kind, exif=exif, quality=95)
    return file.getvalue()


def image_of(job: Path, row: dict[str, Any]) -> Image.Image:
    """As xtuner opens it."""
    return Image.open(job / "data" / "images" / row["image"]).convert("RGB")


class TestWhatComesOut:
    def test_every_row_is_in_one_file_and_every_image_can_be_opened(
        self, job: Path, photos: Path
    ) -> None:
        report = prepared(job, named(), folder=photos, held_out_share=0.25)
        assert (report.rows, report.usable, report.train, report.held_out) == (12, 12, 9, 3)
        assert (report.format, report.images, report.dropped) == ("llava", 12, {})
        rows = rows_of(job, "train") + rows_of(job, "held_out")
        assert {row["id"] for row in rows} == {f"training-{n}" for n in range(1, 13)}
        for row in rows:
            assert list(image_of(job, row).size) == row["image_wh"] == [48, 48]
            question, answer = row["conversations"]
            assert question["value"].startswith("<image>\nWhat is it")
            assert answer["from"] == "gpt"
        assert read_report(job) == report
        files = {path.name for path in (job / "data").iterdir()}
        assert files == {"train.json", "held_out.json", "report.json", "images"}
        assert [path.name for path in job.iterdir()] == ["data"]

    def test_the_rows_are_ascii_whatever_their_language(self, job: Path) -> None:
        rows = [
            {**llava(None, n), "conversations": llava(None, n)["conversations"]} for n in range(5)
        ]
        rows[0]["conversations"][1]["value"] = "图中的菜是麻婆豆腐 🍜"
        prepared(job, rows, held_out_share=0)
        text = (job / "data" / "train.json").read_bytes()
        assert text.isascii()
        assert json.loads(text)[0]["conversations"][1]["value"] == "图中的菜是麻婆豆腐 🍜"

    def test_the_same_data_and_seed_give_the_same_bytes(self, tmp_path: Path, photos: Path) -> None:
        reports = [
            prepared(tmp_path / name, named(), folder=photos, seed=seed, held_out_share=0.3)
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        ]
        assert reports[0] == reports[1]
        assert reports[0].sha256 != reports[2].sha256

    def test_a_prepared_folder_is_not_made_again(self, job: Path, photos: Path) -> None:
        first = prepared(job, named(), folder=photos)
        before = (job / "data" / "train.json").stat().st_mtime_ns
        assert prepared(job, [{"not": "read"}]) == first
        assert (job / "data" / "train.json").stat().st_mtime_ns == before

    def test_rows_without_image_are_kept_and_counted(self, job: Path, photos: Path) -> None:
        report = prepared(job, [*named(6), llava(None, 7)], folder=photos, held_out_share=0)
        assert (report.usable, report.text_only, report.images) == (7, 1, 6)
        assert "image" not in rows_of(job, "train")[-1]

    def test_tokens_are_told_by_rank(self, job: Path, photos: Path) -> None:
        report = prepared(job, [*named(6), llava(None, 7)], folder=photos, held_out_share=0)
        assert 256 < report.tokens.p50 <= report.tokens.p95 <= report.tokens.max < 600
        assert not report.exact_tokens


class TestWhereImagesAre:
    @pytest.mark.parametrize("arcname", [".", "FoodieQA/images"])
    def test_in_an_archive_by_name_or_by_the_end_of_it(
        self, tmp_path: Path, job: Path, photos: Path, arcname: str
    ) -> None:
        archive = packed(tmp_path, photos, arcname)
        assert prepared(job, named(), archive=archive).usable == 12

    def test_an_exact_name_wins_over_an_end_and_two_ends_are_ambiguous(
        self, tmp_path: Path, job: Path
    ) -> None:
        both = tmp_path / "both"
        for folder in ("a", "b"):
            (both / folder).mkdir(parents=True)
        (both / "a" / "1.jpg").write_bytes(jpeg(1))
        (both / "1.jpg").write_bytes(jpeg(2, (30, 20)))
        (both / "b" / "1.jpg").write_bytes(jpeg(3))
        (both / "a" / "2.jpg").write_bytes(jpeg(4))
        (both / "b" / "2.jpg").write_bytes(jpeg(5))
        (both / "a" / "3.jpg").write_bytes(jpeg(6))
        (both / "b" / "3.jpg").write_bytes(jpeg(6))
        rows = [llava("1.jpg"), llava("2.jpg"), llava("3.jpg"), llava("a/2.jpg"), llava("b/3.jpg")]
        report = prepared(job, rows, archive=packed(tmp_path, both), held_out_share=0)
        assert report.dropped == {"image_ambiguous": 1}
        assert report.bad_rows[0].row == 2
        assert rows_of(job, "train")[0]["image_wh"] == [30, 20]
        # Pictures that turned out not to be meant are not kept.
        assert len(list((job / "data" / "images").rglob("*.*"))) == report.images == 3

    def test_two_members_of_one_name_are_ambiguous(self, tmp_path: Path, job: Path) -> None:
        path = tmp_path / "archive"
        with tarfile.open(path, "w") as archive:
            for number in (*range(5), 0):
                data = jpeg(number + 100 * (archive.offset > 0))
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        report = prepared(job, named(5), archive=path, held_out_share=0)
        assert report.dropped == {"image_ambiguous": 1}

    def test_a_name_that_is_not_there_is_shown_one_that_is(
        self, tmp_path: Path, job: Path, photos: Path
    ) -> None:
        rows = [*named(), llava("coco/train/1.jpg")]
        report = prepared(job, rows, archive=packed(tmp_path, photos, "train"))
        assert report.dropped == {"image_not_found": 1}
        assert "named like 'train/" in report.bad_rows[0].message

    def test_in_data_urls_each_once(self, job: Path) -> None:
        rows = [openai(inline(jpeg(n % 3))) for n in range(9)]
        report = prepared(job, rows, held_out_share=0)
        assert (report.format, report.usable, report.images) == ("openai", 9, 3)
        assert len({row["image"] for row in rows_of(job, "train")}) == 3

    def test_at_addresses_of_their_own_asked_for_once(self, job: Path, photos: Path) -> None:
        asked: list[str] = []

        def load(url: str) -> bytes:
            asked.append(url)
            if url.endswith("0.jpg"):
                raise ImageNotFound(f"nothing at {url}")
            return (photos / url.rpartition("/")[2]).read_bytes()

        addresses = [f"https://images.example/{n}.jpg" for n in range(6)] * 2
        report = prepared(job, [openai(url) for url in addresses], load=load)
        assert sorted(asked) == sorted(set(addresses))
        assert report.dropped == {"image_not_found": 2}
        assert report.bad_rows[0].message == "nothing at https://images.example/0.jpg"

    def test_nowhere_says_what_to_do(self, job: Path) -> None:
        with pytest.raises(TooFewRows, match="say in 'images'") as caught:
            prepared(job, named(5))
        assert caught.value.report["dropped"] == {"image_not_found": 5}

    def test_names_that_lead_out_of_the_folder_are_refused(
        self, tmp_path: Path, job: Path, photos: Path
    ) -> None:
        (tmp_path / "secret.jpg").write_bytes(jpeg(99))
        (photos / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        (photos / "out").symlink_to(tmp_path)
        (photos / "inner.jpg").symlink_to(photos / "1.jpg")
        os.mkfifo(photos / "pipe.jpg")
        bad = ["link.jpg", "out/secret.jpg", "../secret.jpg", "pipe.jpg", "missing.jpg", "x" * 300]
        rows = [*named(5), *map(llava, bad), llava("inner.jpg")]
        report = prepared(job, rows, folder=photos, held_out_share=0)
        assert report.usable == 6
        assert report.dropped == {"image_forbidden": 4, "image_not_found": 2}

    def test_hostile_names_in_rows_and_archive_are_refused(
        self, tmp_path: Path, job: Path, photos: Path
    ) -> None:
        archive = packed(tmp_path, photos, "a/../../photos")
        rows = [*named(4), llava("../photos/0.jpg"), llava("/etc/passwd"), llava("file:///x")]
        with pytest.raises(TooFewRows) as caught:
            prepared(job, rows, archive=archive)
        found = caught.value.report
        assert found["dropped"] == {"image_not_found": 4, "image_forbidden": 3}
        assert found["refused_entries"] == {"parent_path": 12}


class TestImagesAreVerified:
    def test_what_happens_to_the_originals_later_does_not_matter(
        self, job: Path, photos: Path
    ) -> None:
        prepared(job, named(), folder=photos, held_out_share=0)
        for path in photos.iterdir():
            path.write_bytes(b"")
            path.unlink()
        for row in rows_of(job, "train"):
            image_of(job, row).load()

    def test_what_xtuner_would_replace_by_another_row_is_dropped(
        self, job: Path, photos: Path
    ) -> None:
        whole = jpeg(50, (400, 300))
        header = b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + b"IHDR"
        (photos / "0.jpg").write_bytes(whole[: len(whole) // 2])
        (photos / "1.jpg").write_bytes(b"")
        (photos / "2.jpg").write_bytes(b"<html>not found</html>")
        (photos / "3.jpg").write_bytes(header + struct.pack(">LL", 60000, 60000) + bytes(9))
        (photos / "4.jpg").write_bytes(jpeg(4, (300, 300), format="PNG")[:-300])
        report = prepared(job, named(), folder=photos, held_out_share=0)
        assert report.usable == report.images == 7
        assert sum(report.dropped.values()) == 5
        assert report.dropped["image_truncated"] == 2
        for row in rows_of(job, "train"):
            image_of(job, row).load()

    @pytest.mark.parametrize("value", range(2, 9))
    def test_a_turned_photograph_is_stored_upright(
        self, job: Path, photos: Path, value: int
    ) -> None:
        from PIL import ImageOps

        turned = with_orientation(jpeg(3, (64, 32)), value)
        (photos / "0.jpg").write_bytes(turned)
        prepared(job, named(5), folder=photos, held_out_share=0)
        row = rows_of(job, "train")[0]
        stored = image_of(job, row)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).convert("RGB")
        assert stored.size == expected.size == tuple(row["image_wh"])
        assert "exif" not in Image.open(job / "data" / "images" / row["image"]).info
        pairs = zip(stored.tobytes(), expected.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 16

    def test_an_upright_photograph_is_stored_as_it_is(self, job: Path, photos: Path) -> None:
        data = with_orientation(jpeg(3), 1)
        (photos / "0.jpg").write_bytes(data)
        prepared(job, named(5), folder=photos, held_out_share=0)
        stored = job / "data" / "images" / rows_of(job, "train")[0]["image"]
        assert stored.read_bytes() == data

    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            ("CMYK", "JPEG"),
            ("L", "JPEG"),
            ("RGBA", "PNG"),
            ("P", "PNG"),
            ("I;16", "PNG"),
            ("1", "TIFF"),
        ],
    )
    def test_pictures_of_other_kinds_look_as_they_do_when_served(
        self, job: Path, photos: Path, mode: str, kind: str
    ) -> None:
        from workers.inference.engines.base import Tiling
        from workers.inference.images import prepare as serve

        file = io.BytesIO()
        source = Image.linear_gradient("L").resize((32, 32))
        source = source if mode == "L" else source.convert("I").convert(mode)
        source.save(file, kind)
        (photos / "0.jpg").write_bytes(file.getvalue())
        prepared(job, named(5), folder=photos, held_out_share=0)
        trained = image_of(job, rows_of(job, "train")[0])
        served = serve(file.getvalue(), ImageSettings(scaling="exact"), Tiling(32))
        assert trained.tobytes() == served.data

    def test_more_bytes_than_accepted(self, job: Path, photos: Path) -> None:
        (photos / "0.jpg").write_bytes(jpeg(0, (400, 400)))
        report = prepared(job, named(), folder=photos, images=ImageSettings(max_bytes=2000))
        assert report.dropped == {"image_too_large": 1}


class TestBadRows:
    def test_are_counted_by_reason_and_the_first_are_shown(self, job: Path, photos: Path) -> None:
        good = [json.dumps(row) for row in named()]
        lines = ["{broken", *good, '{"conversations": []}', *["nonsense"] * 30, "\ud800\0"]
        path = job.parent / "rows.jsonl"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        report = prepared(job, path, folder=photos)
        assert report.rows == report.usable + sum(report.dropped.values()) == 45
        assert report.dropped == {"invalid_json": 32, "no_answer": 1}
        assert len(report.bad_rows) == 20
        assert report.bad_rows[0].row == report.bad_rows[0].line == 1
        assert [bad.row for bad in report.bad_rows] == [1, *range(14, 33)]

    def test_the_first_are_the_first_of_the_file_whenever_they_were_found(
        self, job: Path, photos: Path
    ) -> None:
        (photos / "0.jpg").write_bytes(b"")
        rows = [*named(), *[{"conversations": []}] * 30]
        report = prepared(job, rows, folder=photos)
        first = report.bad_rows[0]
        assert first == BadRow(
            "training", 1, 1, "image_unreadable", "the image is empty (0 bytes)", "image"
        )

    def test_too_many_end_the_job_with_what_was_found(self, job: Path, photos: Path) -> None:
        rows = [*named(), {"conversations": []}]
        with pytest.raises(TooManyBadRows) as caught:
            prepared(job, rows, folder=photos, max_bad_share=0.05)
        assert "1 of 13 rows" in caught.value.message
        assert "row 13 (line 13, turns)" in caught.value.message
        assert caught.value.param == "training_file"
        assert caught.value.report["bad_rows"][0]["line"] == 13
        assert list(job.iterdir()) == []
        assert prepared(job, rows, folder=photos, max_bad_share=0.1).usable == 12

    def test_an_over_long_row_is_dropped_not_cut(self, job: Path, photos: Path) -> None:
        rows = named()
        rows[3]["conversations"][1]["value"] = "x" * 2000
        report = prepared(job, rows, folder=photos, max_length=1500)
        assert report.dropped == {"too_long": 1}
        assert "more than max_length, 1,500" in report.bad_rows[0].message
        assert report.images == 11

    def test_tiles_count_towards_the_length(self, job: Path, photos: Path) -> None:
        (photos / "0.jpg").write_bytes(jpeg(0, (1024, 768)))
        report = prepared(job, named(), folder=photos, max_length=3000)
        assert report.dropped == {"too_long": 1}

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"\xef\xbb\xbf"])
    def test_a_file_without_rows_is_refused(self, job: Path, content: bytes) -> None:
        path = job.parent / "rows"
        path.write_bytes(content)
        for format_ in ("auto", "llava"):
            with pytest.raises(TooFewRows, match="no rows"):
                prepared(job, path, format=format_)

    def test_a_handful_is_too_few(self, job: Path, photos: Path) -> None:
        with pytest.raises(TooFewRows, match="at least 4"):
            prepared(job, named(3), folder=photos)

    def test_more_than_the_server_accepts_is_refused_early(self, job: Path, photos: Path) -> None:
        with pytest.raises(TooManyRows, match="more than the 11 rows"):
            prepared(job, named(), folder=photos, max_rows=11)

    def test_a_format_that_was_named_is_kept_to(self, job: Path, photos: Path) -> None:
        with pytest.raises(TooFewRows) as caught:
            prepared(job, named(), folder=photos, format="openai")
        assert caught.value.report["dropped"] == {"unsupported_parameter": 12}
        with pytest.raises(DatasetInvalid, match="id of a finished batch"):
            prepared(job, named(), folder=photos, format="batch")


class TestSplit:
    def test_rows_of_one_image_stay_together(self, job: Path, photos: Path) -> None:
        rows = [llava(f"{number % 12}.jpg", number) for number in range(60)]
        report = prepared(job, rows, folder=photos, held_out_share=0.3)
        sides = [{row["image"] for row in rows_of(job, name)} for name in ("train", "held_out")]
        assert not sides[0] & sides[1]
        assert report.held_out == 15

    def test_copies_of_an_image_under_other_names_stay_together(
        self, job: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "copies"
        folder.mkdir()
        for number in range(40):
            (folder / f"{number}.jpg").write_bytes(jpeg(number % 5))
        rows = [llava(f"{number}.jpg", number) for number in range(40)]
        report = prepared(job, rows, folder=folder, held_out_share=0.2)
        assert (report.images, report.held_out) == (5, 8)
        assert len({row["image"] for row in rows_of(job, "held_out")}) == 1

    def test_is_bounded_and_another_for_another_seed(self, tmp_path: Path, photos: Path) -> None:
        chosen = []
        for seed in range(6):
            job = tmp_path / f"job{seed}"
            report = prepared(
                job, named(), folder=photos, seed=seed, held_out_share=0.5, max_held_out=3
            )
            assert report.held_out == 3
            chosen.append(tuple(row["id"] for row in rows_of(job, "held_out")))
        assert len(set(chosen)) > 1
        assert any(list(ids) != sorted(ids) for ids in chosen), "not in the order of the file"

    def test_many_rows_of_each_image_do_not_leave_nothing_to_compare_on(
        self, job: Path, photos: Path
    ) -> None:
        rows = [llava(f"{number % 12}.jpg", number) for number in range(120)]
        report = prepared(job, rows, folder=photos, held_out_share=0.1, max_held_out=3)
        assert report.held_out == 10

    def test_none_are_held_out_if_none_are_asked_for(self, job: Path, photos: Path) -> None:
        assert prepared(job, named(), folder=photos, held_out_share=0).held_out == 0
        assert rows_of(job, "held_out") == []

    def test_a_dataset_of_one_image_is_trained_on_whole(self, job: Path, photos: Path) -> None:
        report = prepared(job, [llava("0.jpg", number) for number in range(10)], folder=photos)
        assert (report.train, report.held_out) == (10, 0)

    def test_a_validation_file_is_what_is_held_out(self, job: Path, photos: Path) -> None:
        path = write_lines(job.parent / "validation.jsonl", [llava("0.jpg"), llava("1.jpg"), {}])
        report = prepared(job, named()[1:], folder=photos, validation=path)
        assert [row["id"] for row in rows_of(job, "held_out")] in (
            ["validation-1", "validation-2"],
            ["validation-2", "validation-1"],
        )
        assert report.dropped == {"in_validation_file": 1, "invalid_value": 1}
        assert (report.rows, report.train, report.held_out) == (14, 10, 2)
        assert report.bad_rows[1].file == "validation"

    def test_rows_it_shares_with_training_are_no_bad_rows(self, job: Path, photos: Path) -> None:
        path = write_lines(job.parent / "validation.jsonl", named(6))
        report = prepared(job, named(), folder=photos, validation=path, max_bad_share=0)
        assert (report.train, report.held_out) == (6, 6)

    def test_one_that_is_the_training_file_leaves_nothing(self, job: Path, photos: Path) -> None:
        path = write_lines(job.parent / "rows.jsonl", named())
        with pytest.raises(TooFewRows, match="12 in_validation_file"):
            prepared(job, path, folder=photos, validation=path)

    def test_a_validation_file_of_no_use_fails_by_name(self, job: Path, photos: Path) -> None:
        path = write_lines(job.parent / "validation.jsonl", [llava("none.jpg")])
        with pytest.raises(TooFewRows) as caught:
            prepared(job, named(), folder=photos, validation=path)
        assert caught.value.param == "validation_file"


class TestBatches:
    def test_answers_become_what_is_learned(self, tmp_path: Path, job: Path) -> None:
        requests = [(f"id{n}", openai(inline(jpeg(n)))["messages"][:1]) for n in range(10)]
        files = BatchFiles(
            write_lines(
                tmp_path / "in",
                [
                    {"custom_id": i, "method": "POST", "body": {"model": "m", "messages": m}}
                    for i, m in requests
                ],
            ),
            write_lines(
                tmp_path / "out", [completion(f"id{n}", f"Dish {n}") for n in (3, 2, 1, 0, 4, 5)]
            ),
            write_lines(tmp_path / "err", [failure("id6", "engine_error"), {"custom_id": None}]),
        )
        with (tmp_path / "out").open("a") as stream:
            stream.write(json.dumps(completion("id7", "Cut sho", "length")) + "\n{broken\n")
        with (tmp_path / "in").open("a") as stream:
            # The batch refused it, for an earlier line has this id: its answer is not this one's.
            stream.write(
                json.dumps(
                    {
                        "custom_id": "id3",
                        "body": {"model": "m", "messages": [{"role": "user", "content": "other"}]},
                    }
                )
                + "\nnonsense\n"
            )
        report = prepared(job, files, held_out_share=0)
        assert (report.format, report.rows, report.usable) == ("batch", 12, 6)
        assert report.dropped == {"batch_line_failed": 5, "answer_cut": 1}
        assert "engine_error" in report.bad_rows[0].message
        answers = [row["conversations"][1]["value"] for row in rows_of(job, "train")]
        assert answers == [f"Dish {n}" for n in range(6)]
        assert [path.name for path in job.iterdir()] == ["data"]

    def test_a_batch_without_output_has_no_rows_to_learn(self, tmp_path: Path, job: Path) -> None:
        line = {
            "custom_id": "1",
            "body": {"model": "m", "messages": [{"role": "user", "content": "?"}]},
        }
        files = BatchFiles(write_lines(tmp_path / "in", [line] * 5), None, None)
        with pytest.raises(TooFewRows):
            prepared(job, files)


def completion(custom_id: str, answer: str, reason: str = "stop") -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer},
        "finish_reason": reason,
    }
    body = {"id": "chatcmpl-1", "choices": [choice], "usage": {}}
    return {
        "id": "x",
        "custom_id": custom_id,
        "response": {"status_code": 200, "body": body},
        "error": None,
    }


def failure(custom_id: str, code: str) -> dict[str, Any]:
    body = {"error": {"code": code, "message": "it broke"}}
    return {
        "id": "x",
        "custom_id": custom_id,
        "response": {"status_code": 500, "body": body},
        "error": None,
    }


SLOW_PROGRAM = """
import sys, time
from pathlib import Path
from shared.finetunes import DataSource
from shared.settings import ImageSettings
from workers.inference.engines.base import Tiling
from workers.training.dataset import Inputs, Limits, prepare
from workers.training.row_lengths import RowLengths, TokenRules

seen = []

def keep_going():
    seen.append(0)
    if len(seen) == 30:
        print("half way", flush=True)
        time.sleep(600)

job, rows, photos = map(Path, sys.argv[1:])
prepare(
    job,
    DataSource("file-1"),
    Inputs(rows, lambda url: b"", folder=photos),
    seed=1,
    max_length=8192,
    lengths=RowLengths(TokenRules(Tiling(448), 256)),
    limits=Limits(ImageSettings(), 1000, 1 << 20),
    keep_going=keep_going,
)
"""


class TestWholeOrAbsent:
    def test_a_stop_leaves_nothing(self, job: Path, photos: Path) -> None:
        left = [7]

        def stop() -> None:
            left[0] -= 1
            if not left[0]:
                raise LeaseLost

        with pytest.raises(LeaseLost):
            prepared(job, named(), folder=photos, keep_going=stop)
        assert list(job.iterdir()) == []

    def test_a_disk_that_is_about_to_be_full_stops_it(self, job: Path, photos: Path) -> None:
        with pytest.raises(StorageFull):
            prepared(job, named(), folder=photos, min_free_bytes=1 << 60)
        assert list(job.iterdir()) == []

    def test_a_file_that_went_away_is_a_failure_of_storage(self, job: Path, photos: Path) -> None:
        with pytest.raises(StorageFailed):
            prepared(job, job.parent / "gone.jsonl", folder=photos)
        with pytest.raises(StorageFailed):
            prepared(job, named(), archive=job.parent / "gone.tar")
        assert list(job.iterdir()) == []

    def test_killed_in_the_middle_it_leaves_no_data_and_the_next_run_cleans_up(
        self, tmp_path: Path, job: Path, photos: Path
    ) -> None:
        rows = write_lines(tmp_path / "rows.jsonl", named())
        command = [sys.executable, "-c", SLOW_PROGRAM, str(job), str(rows), str(photos)]
        job.mkdir()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half way\n"
            process.send_signal(signal.SIGKILL)
        left = [path.name for path in job.iterdir()]
        assert len(left) == 1
        assert left[0].startswith(".data.")
        assert read_report(job) is None
        assert prepared(job, named(), folder=photos).usable == 12
        assert [path.name for path in job.iterdir()] == ["data"]

    @pytest.mark.parametrize("step", [1, 8, 16, 24, 32])
    def test_of_two_at_once_the_earlier_one_fails_and_makes_no_half_folder(
        self, job: Path, photos: Path, step: int
    ) -> None:
        """A worker whose lease was lost unnoticed, overtaken at different points of its way."""
        steps: list[int] = []

        def overtaken() -> None:
            steps.append(0)
            if len(steps) == step:
                with pytest.raises(LeaseLost):
                    prepared(job, named(), folder=photos, keep_going=stop)

        def stop() -> None:
            raise LeaseLost

        with pytest.raises(StorageFailed):
            prepared(job, named(), folder=photos, keep_going=overtaken)
        assert len(steps) >= step
        assert list(job.iterdir()) == []

    def test_whoever_is_second_takes_what_the_first_has_made(self, job: Path, photos: Path) -> None:
        steps: list[int] = []
        scratch_name = ""

        def overtaken() -> None:
            nonlocal scratch_name
            steps.append(0)
            if len(steps) == 3:
                # Out of the way, as on a machine that does not see it yet.
                (scratch,) = job.iterdir()
                scratch_name = scratch.name
                aside = scratch.rename(job.parent / "aside")
                prepared(job, named(), folder=photos, seed=5)
                aside.rename(job / scratch_name)

        report = prepared(job, named(), folder=photos, keep_going=overtaken, seed=6)
        assert report == read_report(job)
        assert [path.name for path in job.iterdir()] == ["data"]


@pytest.mark.parametrize("mib", [1, 2, 4])
def test_a_disk_that_runs_full_is_its_own_error_and_the_next_run_goes_through(
    tmp_path: Path, job: Path, mib: int
) -> None:
    """Wherever it runs full: at the rows, at an image, at what is written last."""
    from tests.faults.test_storage_full import small_disk

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(100):
        noise = Image.effect_noise((96, 96), number + 1)
        noise.save(folder / f"{number}.jpg", quality=90)
    rows = [llava(f"{number}.jpg") for number in range(100)]
    for row in rows:
        row["conversations"][1]["value"] = "x" * 30_000
    path = write_lines(tmp_path / "rows.jsonl", rows)
    job.mkdir()
    options: dict[str, Any] = {"folder": folder, "max_length": 1 << 20}
    with small_disk(job, mib):
        with pytest.raises(StorageFull):
            prepared(job, path, **options)
        assert list(job.iterdir()) == []
    assert prepared(job, path, **options).usable == 100
