"""Image sets captioned again and again: only what is new or changed is asked, every name has its line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faults.batches import results, wait_until_ended
from tests.image_sets import jpeg, tar, write, zipped
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


def ask(node: RunningNode, images: Any, **fields: Any) -> httpx.Response:
    """``POST /v1/captions`` with ``sync``."""
    body = {"model": "echo", "images": images, "sync": True, **fields}
    if "template" not in body:
        body.setdefault("prompt", "say it")
    return httpx.post(f"{node.base_url}/captions", json=body)


def started(node: RunningNode, images: Any, **fields: Any) -> str:
    """The id of a sync that was accepted."""
    answer = ask(node, images, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def sync(node: RunningNode, images: Any, **fields: Any) -> Any:
    """A whole sync, ended."""
    return wait_until_ended(node.sdk(max_retries=0), started(node, images, **fields))


def lines(sdk: openai.OpenAI, batch: Any) -> dict[str, dict[str, Any]]:
    """The output lines by name."""
    rows = results(sdk, batch.output_file_id)
    found = {row["custom_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def asked(sdk: openai.OpenAI, batch: Any) -> list[str]:
    """The names whose images were really asked about, in their order."""
    rows = results(sdk, batch.output_file_id)
    names = [row["custom_id"] for row in rows if "vlmq" not in row]
    # What was paid for agrees: 256 tokens for the image of each and two words.
    assert batch.usage.input_tokens == 258 * len(names), batch.model_dump_json(indent=1)
    return names


def filled(folder: Path, numbers: range, *, old: bool = True) -> Path:
    """A folder of pictures, all different."""
    for number in numbers:
        path = write(folder / f"{number:03}.jpg", jpeg(number))
        if old:
            age(path)
    return folder


def age(path: Path) -> None:
    """Make a file look as if it had been written a minute ago."""
    then = time.time() - 60
    os.utime(path, (then, then))


def test_a_grown_folder_costs_only_what_is_new(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Every name has its line again, the old ones with a mark that says who paid."""
    folder = filled(images / "grown", range(5))
    first = sync(node, str(folder))
    assert first.status == "completed"
    assert len(asked(sdk, first)) == 5
    assert first.vlmq["sync"] == {"known": 0, "duplicates": 0, "passed": 0}
    filled(folder / "more", range(10, 13))
    second = sync(node, str(folder))
    assert asked(sdk, second) == ["more/010.jpg", "more/011.jpg", "more/012.jpg"]
    assert second.vlmq["sync"] == {"known": 5, "duplicates": 0, "passed": 0}
    assert second.request_counts.completed == 8
    before, after = lines(sdk, first), lines(sdk, second)
    assert after["001.jpg"]["vlmq"] == {"captioned_in": first.id}
    for name, row in before.items():
        again = after[name]["response"]["body"]
        assert again["choices"] == row["response"]["body"]["choices"]
        assert again["usage"] == row["response"]["body"]["usage"]
    third = sync(node, str(folder))
    assert asked(sdk, third) == []
    assert lines(sdk, third)["more/010.jpg"]["vlmq"] == {"captioned_in": second.id}


def test_moved_files_keep_their_captions_and_changed_ones_do_not(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Deleted ones have no line; if they come back they have their captions still."""
    folder = filled(images / "moved", range(20, 26))
    first = sync(node, str(folder))
    (folder / "a").mkdir()
    (folder / "020.jpg").rename(folder / "a" / "other.jpg")
    age(write(folder / "021.jpg", jpeg(99)))
    (folder / "022.jpg").unlink()
    second = sync(node, str(folder))
    assert asked(sdk, second) == ["021.jpg"]
    found = lines(sdk, second)
    assert sorted(found) == ["021.jpg", "023.jpg", "024.jpg", "025.jpg", "a/other.jpg"]
    assert found["a/other.jpg"]["vlmq"] == {"captioned_in": first.id}
    write(folder / "back.jpg", jpeg(22))
    assert asked(sdk, sync(node, str(folder))) == []


def test_duplicates_cost_once_and_each_name_has_the_line(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """In the same chunk, in chunks far apart, and in chunks that run at the same time."""
    folder = images / "twice"
    for number in range(120):
        write(folder / f"{number:03}.jpg", jpeg(number % 40))
    ended = sync(node, str(folder))
    assert ended.status == "completed"
    assert len(asked(sdk, ended)) == 40
    assert ended.vlmq["sync"] == {"known": 0, "duplicates": 80, "passed": 0}
    found = lines(sdk, ended)
    assert len(found) == 120
    assert found["085.jpg"]["vlmq"] == {"same_as": "005.jpg"}
    again = sync(node, str(folder))
    assert asked(sdk, again) == []
    assert again.vlmq["sync"]["known"] == 120


def test_what_failed_is_tried_again(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """A duplicate of what failed is asked about itself, and fails for the same reason."""
    folder = filled(images / "failed", range(60, 63))
    for name in ("bad.jpg", "bad2.jpg"):
        age(write(folder / name, jpeg(61)[:200]))
    first = sync(node, str(folder))
    counts = first.request_counts
    assert (counts.completed, counts.failed) == (3, 2)
    again = sync(node, str(folder))
    assert (again.request_counts.completed, again.request_counts.failed) == (3, 2)
    age(write(folder / "bad.jpg", jpeg(70)))
    mended = sync(node, str(folder))
    assert asked(sdk, mended) == ["bad.jpg"]
    assert mended.request_counts.failed == 1
    age(write(folder / "bad2.jpg", jpeg(71)))
    retried = sdk.post(f"/batches/{mended.id}/retry", cast_to=openai.types.Batch)
    assert asked(sdk, wait_until_ended(sdk, retried.id)) == ["bad2.jpg"]
    assert asked(sdk, sync(node, str(folder))) == []  # what a retry paid for is remembered, too


def test_another_question_or_model_means_anew(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Prompt, parameters, and the model's revision count; going back to an old question costs nothing."""
    folder = filled(images / "asked", range(80, 83))
    everything = ["080.jpg", "081.jpg", "082.jpg"]
    assert asked(sdk, sync(node, str(folder))) == everything
    assert asked(sdk, sync(node, str(folder), prompt="say that")) == everything
    assert asked(sdk, sync(node, str(folder), max_tokens=7)) == everything
    assert asked(sdk, sync(node, str(folder))) == []
    node.stores.models.link("echo", None, engine="echo", replace=True)
    assert asked(sdk, sync(node, str(folder))) == everything
    assert asked(sdk, sync(node, str(folder))) == []


def test_templates_count_as_filled_in(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """A changed sidecar is another question; the same picture with other words is no duplicate."""
    folder = images / "template"
    for name, words in (("a", "one"), ("b", "two"), ("c", "one")):
        age(write(folder / f"{name}.jpg", jpeg(5)))
        write(folder / f"{name}.txt", words)
    first = sync(node, str(folder), template="say {txt}")
    assert asked(sdk, first) == ["a.jpg", "b.jpg"]
    texts = {
        name: row["response"]["body"]["choices"][0]["message"]["content"]
        for name, row in lines(sdk, first).items()
    }
    assert texts == {"a.jpg": "say one", "b.jpg": "say two", "c.jpg": "say one"}
    write(folder / "b.txt", "six")
    assert asked(sdk, sync(node, str(folder), template="say {txt}")) == ["b.jpg"]


def test_only_new_leaves_out_what_has_its_line_already(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """A moved file has a line under its new name; with nothing to do the batch completes all the same."""
    folder = filled(images / "new", range(90, 94))
    sync(node, str(folder))
    (folder / "091.jpg").rename(folder / "z.jpg")
    filled(folder, range(95, 96))
    wanted = {"only_new": True}
    ended = sync(node, str(folder), sync=wanted)
    assert sorted(lines(sdk, ended)) == ["095.jpg", "z.jpg"]
    assert asked(sdk, ended) == ["095.jpg"]
    assert ended.vlmq["sync"] == {"known": 1, "duplicates": 0, "passed": 3}
    nothing = sync(node, str(folder), sync=wanted)
    assert nothing.status == "completed"
    assert (nothing.request_counts.total, nothing.output_file_id) == (0, None)
    assert nothing.vlmq["sync"]["passed"] == 5
    assert nothing.vlmq["listing"] == {"complete": True, "images": 0}
    assert httpx.get(f"{node.base_url}/batches/{nothing.id}/results").text == ""
    with pytest.raises(openai.BadRequestError, match="no line of the batch failed"):
        sdk.post(f"/batches/{nothing.id}/retry", cast_to=object)


def test_size_and_time_are_believed_unless_told_otherwise(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """A file put in place of another, with its size and time, shows only when all are read."""
    folder = filled(images / "believed", range(100, 102))
    sync(node, str(folder))
    path = folder / "100.jpg"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 1  # in the last pixels
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert asked(sdk, sync(node, str(folder))) == []
    assert asked(sdk, sync(node, str(folder), sync={"rehash": True})) == ["100.jpg"]


def test_a_file_written_a_moment_ago_is_read_again(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Its next change might leave size and time as they are."""
    folder = filled(images / "young", range(103, 105), old=False)
    sync(node, str(folder))
    path = folder / "103.jpg"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert asked(sdk, sync(node, str(folder))) == ["103.jpg"]


def test_a_named_set_may_move_and_become_archives(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """A set by its name is the same wherever its images are: folder, tar or zip."""
    folder = filled(images / "named", range(110, 113))
    assert len(asked(sdk, sync(node, str(folder), sync="holidays"))) == 3
    members = [(f"x/{number}.jpg", jpeg(number)) for number in range(110, 115)]
    archive = tar(images / "named.tar", members)
    age(archive)
    assert asked(sdk, sync(node, str(archive), sync="holidays")) == ["x/113.jpg", "x/114.jpg"]
    packed = zipped(images / "named.zip", [*members, ("new.jpg", jpeg(120))])
    both = [str(packed), str(archive)]
    ended = sync(node, both, sync="holidays")
    assert asked(sdk, ended) == ["named.zip/new.jpg"]
    assert len(lines(sdk, ended)) == 11
    assert len(asked(sdk, sync(node, str(folder)))) == 3  # without its name it is another set
    assert len(asked(sdk, sync(node, str(folder), sync="another"))) == 3


def test_a_second_sync_of_a_set_is_refused_while_the_first_runs(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """The answer names the first; a cancelled one counts for what it did, and lets the next one go."""
    folder = filled(images / "two", range(130, 170))
    slow = {"prompt": "say it [[echo:sleep=0.3]]"}
    first = started(node, str(folder), **slow)
    answer = ask(node, [str(folder)], **slow)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("sync_in_progress", "sync")
    assert first in error["message"]
    assert ask(node, str(folder), sync="by another name").status_code == 200
    assert ask(node, str(folder), sync=False).status_code == 200
    sdk.batches.cancel(first)
    stopped = wait_until_ended(sdk, first)
    second = sync(node, str(folder), **slow)
    assert second.status == "completed"
    assert second.vlmq["sync"]["known"] == stopped.request_counts.completed


def test_the_command_line_syncs(node: RunningNode, sdk: openai.OpenAI, images: Path) -> None:
    """By its places or by its name; what belongs to a sync needs one."""
    folder = filled(images / "cli", range(180, 183))
    command = ["caption", str(folder), "--model", "echo", "--prompt", "say it", "--json", "--watch"]
    asked_for = []
    for more in (
        [],
        ["--sync"],
        ["--sync"],
        ["--sync", "--only-new"],
        ["--set", "cli", "--rehash"],
    ):
        process = node.vlmq(*command, *more)
        output, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        batch = json.loads(output)
        found = sdk.batches.retrieve(batch["id"])
        asked_for.append((found.request_counts.total, len(asked(sdk, found))))
        assert (found.vlmq["sync"] is None) == (more == [])
    assert asked_for == [(3, 3), (3, 3), (3, 0), (0, 0), (3, 3)]
    process = node.vlmq(*command, "--only-new")
    assert "need --sync" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
