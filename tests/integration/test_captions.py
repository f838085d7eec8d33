"""Image sets as caption jobs on a node: every kind of place, and what goes wrong while they run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.faults.batches import results, wait_until_ended
from tests.image_sets import jpeg, tar, write, zipped
from tests.running_node import ECHO, RunningNode, running_node, wait_for

SLOW = {"model": "slow", "engine": "echo", "max_running": 4, "options": {"delay_s": 0.1}}
QUICK_LEASES = {"lease_ttl_s": 6, "renew_s": 1, "reap_s": 0.5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the node may read images from."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def node(images: Path) -> Iterator[RunningNode]:
    """A node that serves ``echo``, and slowly ``slow``, and may read the images."""
    with running_node(
        models=(ECHO, SLOW),
        images={"roots": [str(images)], "allow_http": False},
        queue=QUICK_LEASES,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=5)


def post(node: RunningNode, body: Any, **headers: str) -> httpx.Response:
    """``POST /v1/captions``."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{node.base_url}/captions", content=content, headers=headers, timeout=30)


def caption(node: RunningNode, images: Any, **fields: Any) -> dict[str, Any]:
    """A caption job, which must be accepted."""
    body = {"model": "echo", "images": images, **fields}
    if "template" not in body:
        body.setdefault("prompt", "say it")
    answer = post(node, body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def captions(sdk: openai.OpenAI, batch: Any) -> dict[str, str]:
    """What was answered, by name."""
    return {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in results(sdk, batch.output_file_id)
    }


def failures(sdk: openai.OpenAI, batch: Any) -> dict[str, str]:
    """The codes of what failed, by name."""
    return {
        row["custom_id"]: (row["error"] or row["response"]["body"]["error"])["code"]
        for row in results(sdk, batch.error_file_id)
    }


def test_a_folder_is_captioned_in_the_order_of_its_names(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Folders within it, too; what is no image is passed over. It is a batch like any other."""
    folder = images / "order"
    for name in ("b/2.png", "b/10.JPG", "a.jpg", "c.webp", "b.jpeg", "b/c/1.jpg"):
        write(folder / name, jpeg())
    for name in ("notes.txt", ".hidden.jpg", ".git/1.jpg", "b/2.txt", "set.zip"):
        write(folder / name)
    made = caption(node, str(folder), max_tokens=7, seed=3, metadata={"who": "me"})
    assert (made["object"], made["input_file_id"]) == ("batch", None)
    assert (made["endpoint"], made["metadata"]) == ("/v1/chat/completions", {"who": "me"})
    asked = made["vlmq"]["captions"]
    assert (asked["max_tokens"], asked["prompt"]) == (7, "say it")
    ended = wait_until_ended(sdk, made["id"])
    assert ended.status == "completed"
    listed = ["a.jpg", "b/10.JPG", "b/2.png", "b/c/1.jpg", "b.jpeg", "c.webp"]
    assert list(captions(sdk, ended)) == listed
    assert ended.vlmq["listing"] == {"complete": True, "images": len(listed)}
    [first, *_] = results(sdk, ended.output_file_id)
    assert first["response"]["body"]["usage"]["prompt_tokens"] == 256 + 2
    assert sdk.batches.list(limit=1).data[0].id == made["id"]
    told = json.loads((node.stores.batches.folder(made["id"]) / "provenance.json").read_text())
    assert [(item["model"], item["prompt"], item["chunks"]) for item in told] == [
        ("echo", "say it", 1)
    ]
    assert told[0]["parameters"]["max_tokens"] == 7
    assert told[0]["versions"]["vlmq"]


def test_every_kind_of_place_in_one_job(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Their texts go into the template, wherever they come from."""
    folder = images / "kinds"
    write(folder / "photos" / "1.jpg", jpeg(1))
    write(folder / "photos" / "1.txt", "a folder's\n")
    shard = tar(folder / "shards" / "0.tar", [("2.jpg", jpeg(2)), ("2.txt", b"a tar's")])
    archive = zipped(folder / "3.zip", [("3.jpg", jpeg(3)), ("3.txt", b"a zip's")])
    write(folder / "list.jsonl", json.dumps({"image": "photos/1.jpg", "txt": "a list's"}) + "\n")
    table = pa.table({"image": [jpeg(5)], "txt": ["a table's"]})
    pyarrow.parquet.write_table(table, folder / "5.parquet")
    uploaded = sdk.files.create(file=("up.zip", archive.read_bytes()), purpose="vision")
    places = [
        str(folder / "photos"),
        str(folder / "shards" / "*.tar"),
        {"path": str(archive)},
        str(folder / "list.jsonl"),
        {"path": str(folder / "5.parquet"), "type": "table", "image_column": "image"},
        uploaded.id,
    ]
    assert shard.exists()
    made = caption(node, places, template="it has {txt} {{text}}")
    ended = wait_until_ended(sdk, made["id"])
    assert failures(sdk, ended) == {}
    assert captions(sdk, ended) == {
        "photos/1.jpg": "it has a folder's {text}",
        "shards/0.tar/2.jpg": "it has a tar's {text}",
        "3.zip/3.jpg": "it has a zip's {text}",
        "list.jsonl/photos/1.jpg": "it has a list's {text}",
        "5.parquet/00000000": "it has a table's {text}",
        f"{uploaded.id}/3.jpg": "it has a zip's {text}",
    }
    sdk.files.delete(uploaded.id)  # nobody uses it any more


def test_what_cannot_be_used_fails_alone_and_says_why(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """In a hostile archive, and beside it."""
    folder = images / "bad"
    members = [
        ("../up.jpg", jpeg()),
        ("cut.jpg", jpeg()[:-40]),
        ("in.zip", b"x"),
        ("ok.jpg", jpeg()),
    ]
    tar(folder / "set.tar", members)
    write(folder / "photos" / "no.jpg", b"no image")
    write(folder / "photos" / "phone.heic", b"....ftypheic")
    write(folder / "photos" / "ok.jpg", jpeg())
    (folder / "photos" / "gone.jpg").symlink_to("nothing")
    (folder / "photos" / "secret.jpg").symlink_to("/etc/passwd")
    write(folder / "photos" / "\udcff.jpg", jpeg())
    made = caption(node, [str(folder / "set.tar"), str(folder / "photos")])
    ended = wait_until_ended(sdk, made["id"])
    assert ended.status == "completed"
    assert list(captions(sdk, ended)) == ["set.tar/ok.jpg", "photos/ok.jpg", "photos/\\xff.jpg"]
    assert failures(sdk, ended) == {
        "set.tar/../up.jpg": "entry_refused",
        "set.tar/in.zip": "entry_refused",
        "set.tar/cut.jpg": "image_truncated",
        "photos/no.jpg": "image_unreadable",
        "photos/phone.heic": "image_unreadable",
        "photos/gone.jpg": "image_not_found",
        "photos/secret.jpg": "image_forbidden",
    }


def test_files_that_change_or_vanish_while_it_runs_fail_alone(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Retried, what is there by then is captioned; nothing else is asked again."""
    folder = images / "moving"
    for number in range(300):
        write(folder / f"{number:03d}.jpg", jpeg(number))
    made = caption(node, str(folder), model="slow")
    wait_for(lambda: sdk.batches.retrieve(made["id"]).vlmq["listing"]["complete"], "listing", 30)
    write(folder / "299.jpg", jpeg(2) + b" ")
    (folder / "298.jpg").unlink()
    ended = wait_until_ended(sdk, made["id"])
    assert failures(sdk, ended) == {"298.jpg": "image_not_found", "299.jpg": "image_changed"}
    assert list(captions(sdk, ended)) == [f"{number:03d}.jpg" for number in range(298)]

    retried = httpx.post(f"{node.base_url}/batches/{made['id']}/retry").json()
    assert retried["vlmq"]["retry_of"] == made["id"]
    with pytest.raises(openai.ConflictError):
        sdk.with_options(max_retries=0).files.delete(ended.error_file_id)
    ended = wait_until_ended(sdk, retried["id"])
    assert list(captions(sdk, ended)) == ["299.jpg"]
    assert failures(sdk, ended) == {"298.jpg": "image_not_found"}

    write(folder / "298.jpg", jpeg())
    again = httpx.post(f"{node.base_url}/batches/{retried['id']}/retry").json()
    ended = wait_until_ended(sdk, again["id"])
    assert list(captions(sdk, ended)) == ["298.jpg"]
    refused = httpx.post(f"{node.base_url}/batches/{again['id']}/retry")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "batch_id")


def test_a_missing_text_is_told_by_its_column(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Images that have it are captioned."""
    folder = images / "texts"
    write(folder / "1.jpg", jpeg())
    write(folder / "2.jpg", jpeg())
    write(folder / "2.json", '{"title": {"en": "Two"}}')
    made = caption(node, str(folder), template="{json.title.en}")
    ended = wait_until_ended(sdk, made["id"])
    assert captions(sdk, ended) == {"2.jpg": "Two"}
    [row] = results(sdk, ended.error_file_id)
    error = row["response"]["body"]["error"]
    assert (error["code"], error["param"]) == ("text_missing", "template")
    assert "{json.title.en}" in error["message"]


def long_list(folder: Path, count: int) -> Path:
    """A list of which every hundredth line names an image, and the others none."""
    write(folder / "1.jpg", jpeg(1, (8, 8)))
    lines = ['{"image": "1.jpg"}' if number % 100 == 0 else "{}" for number in range(count)]
    return write(folder / "list.jsonl", "\n".join(lines))


def listing_runs(sdk: openai.OpenAI, batch_id: str) -> bool:
    """Whether some of the set is listed, and more will come."""
    found = sdk.batches.retrieve(batch_id)
    assert not found.vlmq["listing"]["complete"], "too fast to be caught"
    return bool(found.vlmq["listing"]["images"])


def test_kill_9_while_it_is_listed_and_run_loses_and_doubles_nothing(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Of every batch process at once; a reader with a cursor gets every line once meanwhile."""
    count = 150_000
    made = caption(node, str(long_list(images / "killed", count)))
    wait_for(lambda: listing_runs(sdk, made["id"]), "some images", 30)
    for child in node.batch_children():
        os.kill(child, signal.SIGKILL)
    seen: Counter[str] = Counter()
    after, complete = 0, False
    deadline = time.monotonic() + 90
    while not complete:
        assert time.monotonic() < deadline
        page = httpx.get(
            f"{node.base_url}/batches/{made['id']}/results",
            params={"after": after, "limit": 20_000},
            timeout=30,
        )
        rows = [json.loads(line) for line in page.text.splitlines()]
        seen.update(row["custom_id"] for row in rows)
        complete = page.headers["vlmq-complete"] == "true"
        if int(page.headers["vlmq-next-after"]) == after:
            time.sleep(0.2)
        after = int(page.headers["vlmq-next-after"])
    ended = sdk.batches.retrieve(made["id"])
    assert ended.status == "completed"
    assert (ended.request_counts.total, ended.request_counts.completed) == (count, count // 100)
    assert set(seen.values()) == {1}
    assert len(seen) == count


def test_one_process_runs_a_set_while_it_lists_it(images: Path) -> None:
    """By turns, so that captions come before the listing has ended."""
    path = long_list(images / "alone", 150_000)
    alone = {"images": {"roots": [str(images)]}, "node": {"batch_processes": 1}}
    with running_node(**alone, queue={"slice_s": 0.1}) as own:  # type: ignore[arg-type]
        sdk = own.sdk(max_retries=0)
        made = caption(own, str(path))
        wait_for(lambda: has_some(sdk, made["id"]), "captions", 30)
        sdk.batches.cancel(made["id"])
        wait_until_ended(sdk, made["id"])


def has_some(sdk: openai.OpenAI, batch_id: str) -> bool:
    """Whether something is captioned, of a set whose listing goes on."""
    found = sdk.batches.retrieve(batch_id)
    assert not found.vlmq["listing"]["complete"], "the listing ended first"
    return found.request_counts.completed > 0


def test_a_job_can_be_cancelled_while_it_is_listed(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """What was listed is accounted for."""
    count = 150_000
    made = caption(node, str(long_list(images / "cancelled", count)), model="slow")
    wait_for(lambda: listing_runs(sdk, made["id"]), "some images", 30)
    sdk.batches.cancel(made["id"])
    ended = wait_until_ended(sdk, made["id"])
    assert ended.status == "cancelled"
    counts = ended.request_counts
    assert 0 < counts.total < count
    assert counts.completed + counts.failed == counts.total
    assert not ended.vlmq["listing"]["complete"]


def test_the_same_idempotency_key_makes_one_job(node: RunningNode, images: Path) -> None:
    """And another request under it is refused."""
    write(images / "once" / "1.jpg", jpeg())
    body = {"model": "echo", "images": str(images / "once"), "prompt": "a"}
    key = {"idempotency-key": "captions-1"}
    first, second = post(node, body, **key), post(node, body, **key)
    assert first.json()["id"] == second.json()["id"]
    assert post(node, {**body, "prompt": "b"}, **key).status_code == 422


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"model": None}, "model"),
        ({"images": []}, "images"),
        ({"images": "relative"}, "images"),
        ({"images": "/etc"}, "images"),
        ({"images": "/ROOT/../etc"}, "images"),
        ({"images": "/ROOT/nothing"}, "images"),
        ({"images": "/ROOT/nothing/*.jpg"}, "images"),
        ({"images": ["/ROOT/", {"path": "/etc/x", "type": "tar"}]}, "images[1]"),
        ({"images": {"type": "tar"}}, "images"),
        ({"images": {"path": "/ROOT", "file": "file-1"}}, "images"),
        ({"images": {"path": "/ROOT", "kind": "tar"}}, "images.kind"),
        ({"images": [{"path": "/ROOT", "type": "rar"}]}, "images[0].type"),
        ({"images": "file-0123456789abcdef01234567"}, "images"),
        ({"prompt": None}, "prompt"),
        ({"template": "{txt}"}, "template"),
        ({"prompt": None, "template": "no column"}, "template"),
        ({"prompt": None, "template": "a {b"}, "template"),
        ({"prompt": "", "template": None}, "prompt"),
        ({"temperature": 3}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_a_wrong_field_is_named(
    node: RunningNode, images: Path, changes: dict[str, Any], param: str
) -> None:
    """Before there is a job."""
    body = {"model": "echo", "images": str(images), "prompt": "say it", **changes}
    text = json.dumps({key: value for key, value in body.items() if value is not None})
    answer = post(node, text.replace("/ROOT", str(images)).encode())
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), answer.text
    assert error["param"].startswith(param), error
    assert error["message"]


def test_a_set_without_images_fails(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """With a reason."""
    write(images / "empty" / "notes.txt")
    ended = wait_until_ended(sdk, caption(node, str(images / "empty"))["id"])
    assert ended.status == "failed"
    assert ended.errors is not None
    assert [error.code for error in ended.errors.data] == ["image_set_unreadable"]


# --- the command line -------------------------------------------------------------------------


def vlmq(node: RunningNode, *arguments: str, status: int = 0) -> tuple[str, str]:
    """``vlmq caption ARGUMENTS``, run to its end; returns standard output and standard error."""
    process = node.vlmq("caption", "--model", "echo", *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    return out, err


def test_the_command_captions_a_folder_and_stays(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """With parameters; the answers are read like any batch's."""
    write(images / "cli" / "1.jpg", jpeg())
    write(images / "cli" / "2.jpg", b"no image")
    words = ["--prompt", "one two three", "--max-tokens", "2", "--stop", "x", "--stop", "y"]
    out, err = vlmq(node, str(images / "cli"), *words, "--watch", "--json", "--metadata", "a=b")
    batch = json.loads(out)
    assert "done: 1/2 (1 failed)" in err
    assert batch["metadata"] == {"a": "b"}
    assert batch["vlmq"]["captions"]["stop"] == ["x", "y"]
    assert captions(sdk, sdk.batches.retrieve(batch["id"])) == {"1.jpg": "one two"}


def test_the_command_sends_what_is_here(
    node: RunningNode, sdk: openai.OpenAI, tmp_path: Path
) -> None:
    """A folder is packed, with the texts in it; an archive goes as it is."""
    write(tmp_path / "mine" / "a.jpg", jpeg())
    write(tmp_path / "mine" / "a.txt", "hello")
    archive = zipped(tmp_path / "b.zip", [("b.jpg", jpeg()), ("b.txt", b"there")])
    out, _ = vlmq(node, str(tmp_path / "mine"), str(archive), "--template", "{txt}", "--upload",
                  "--watch", "--json")  # fmt: skip
    found = captions(sdk, sdk.batches.retrieve(json.loads(out)["id"]))
    assert sorted(found.values()) == ["hello", "there"]


def test_the_command_says_what_to_do(node: RunningNode, tmp_path: Path) -> None:
    """Outside of the roots, without a prompt, with nothing there."""
    write(tmp_path / "1.jpg", jpeg())
    _, err = vlmq(node, str(tmp_path), "--prompt", "x", status=1)
    assert "--upload" in err
    _, err = vlmq(node, str(tmp_path), status=2)
    assert "--template" in err
    _, err = vlmq(node, str(tmp_path / "no"), "--prompt", "x", "--upload", status=1)
    assert "there is no" in err
