"""Captions that are not good enough, on a node: asked for again, counted, listed for review."""

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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the node may read images from."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def node(images: Path) -> Iterator[RunningNode]:
    """A node that serves ``echo``, which answers with an image's own text."""
    with running_node(images={"roots": [str(images)]}) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, pointed at the node."""
    return node.sdk(max_retries=0)


def fill(folder: Path, captions: dict[str, str]) -> Path:
    """A folder with an image per name, and what is to be said of it beside it."""
    for number, (name, text) in enumerate(captions.items()):
        write(folder / f"{name}.jpg", jpeg(number))
        write(folder / f"{name}.txt", text)
    return folder


def captioned(node: RunningNode, sdk: openai.OpenAI, folder: Path, **fields: Any) -> Any:
    """The batch of a caption job over the folder, once it has ended."""
    body = {"model": "echo", "images": str(folder), "template": "{txt}", **fields}
    answer = httpx.post(f"{node.base_url}/captions", json=body)
    assert answer.status_code == 200, answer.text
    return wait_until_ended(sdk, answer.json()["id"])


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Lines by the names of their images, without the suffix."""
    return {row["custom_id"].removesuffix(".jpg"): row for row in rows}


def content(row: dict[str, Any]) -> str:
    """The caption of a line."""
    text: str = row["response"]["body"]["choices"][0]["message"]["content"]
    return text


def reviewed(node: RunningNode, batch_id: str, **query: Any) -> list[dict[str, Any]]:
    """``GET /v1/batches/{id}/review``."""
    answer = httpx.get(f"{node.base_url}/batches/{batch_id}/review", params=query)
    assert answer.status_code == 200, answer.text
    return [httpx.Response(200, text=line).json() for line in answer.text.splitlines()]


def test_bad_captions_are_asked_for_again_and_those_that_stay_bad_are_listed(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Each with its reasons; good ones are asked for once."""
    folder = fill(
        images / "gate",
        {
            "good": "a red circle",
            "blank": "[[echo:blank]]",
            "sometimes-blank": "[[echo:blank=0.7]] a blue square",
            "loop": "[[echo:loop]]",
            "refusal": "[[echo:refuse]]",
            "chinese": "[[echo:chinese]]",
            "long": " ".join(f"word{number}" for number in range(200)),
            "broken": "[[echo:error]]",
        },
    )
    quality = {"language": "en", "resamples": 3}
    ended = captioned(node, sdk, folder, quality=quality, temperature=0, max_tokens=90, seed=1)
    assert ended.status == "completed"
    counts = ended.request_counts
    assert (counts.total, counts.completed, counts.failed) == (8, 7, 1)
    assert ended.vlmq["failures"] == {"engine_error": 1}
    rows = by_name(results(sdk, ended.output_file_id))
    judged = {name: row["vlmq"]["quality"] for name, row in rows.items()}
    assert judged["good"] == {"verdict": "pass"}
    assert judged["blank"] == {
        "verdict": "review", "reasons": ["empty"], "resampled": [["empty"]] * 3
    }  # fmt: skip
    assert judged["loop"]["reasons"] == ["repeating"]
    assert judged["refusal"]["reasons"] == ["refusing"]
    assert judged["chinese"]["reasons"] == ["wrong_language"]
    assert judged["long"]["reasons"] == ["truncated"]
    came_good = judged["sometimes-blank"]
    assert (came_good["verdict"], came_good["resampled"]) == ("pass", [["empty"], ["empty"]])
    assert came_good["temperature"] >= 0.7
    assert came_good["seed"] != 1
    assert content(rows["sometimes-blank"]).endswith("a blue square")
    assert ended.vlmq["quality"] == {
        "review": {
            "captions": 5,
            "reasons": {
                "empty": 1, "refusing": 1, "repeating": 1, "truncated": 1, "wrong_language": 1
            },
        },
        "resampled": {
            "captions": 6,
            "reasons": {
                "empty": 5, "refusing": 3, "repeating": 3, "truncated": 3, "wrong_language": 3
            },
        },
    }  # fmt: skip
    listed = by_name(reviewed(node, ended.id))
    assert set(listed) == {"blank", "loop", "refusal", "chinese", "long"}
    assert listed["loop"] == rows["loop"]
    # Tokens that were paid for count, whether or not their captions were kept.
    kept = sum(row["response"]["body"]["usage"]["completion_tokens"] for row in rows.values())
    assert ended.usage.output_tokens > 3 * kept


def test_without_a_gate_nothing_is_judged(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Lines are as those of any batch."""
    folder = fill(images / "open", {"blank": "[[echo:blank]]", "good": "a red circle"})
    ended = captioned(node, sdk, folder)
    rows = by_name(results(sdk, ended.output_file_id))
    assert set(rows["blank"]) == {"id", "custom_id", "response", "error"}
    assert ended.vlmq["quality"] is None
    assert reviewed(node, ended.id) == []


def test_a_gate_without_resamples_only_judges(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """And only what it is asked to."""
    folder = fill(images / "judge", {"blank": "[[echo:blank]]", "refusal": "[[echo:refuse]]"})
    ended = captioned(node, sdk, folder, quality={"resamples": 0, "checks": ["refusing"]})
    rows = by_name(results(sdk, ended.output_file_id))
    assert rows["blank"]["vlmq"]["quality"] == {"verdict": "pass"}
    assert rows["refusal"]["vlmq"]["quality"] == {"verdict": "review", "reasons": ["refusing"]}
    assert ended.vlmq["quality"]["resampled"] == {"captions": 0, "reasons": {}}


def test_the_list_for_review_is_read_page_by_page(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Its cursor is that of the results; a caption that quotes a verdict has none."""
    quoted = '"vlmq":{"quality":{"verdict":"review"'
    captions = {
        f"{number:02}": "[[echo:blank]]" if number % 3 == 0 else quoted for number in range(9)
    }
    ended = captioned(node, sdk, fill(images / "pages", captions), quality={"resamples": 0})
    found, after, complete = [], "0", "false"
    while complete == "false":
        answer = httpx.get(
            f"{node.base_url}/batches/{ended.id}/review", params={"after": after, "limit": 2}
        )
        found += [httpx.Response(200, text=line).json() for line in answer.text.splitlines()]
        after, complete = answer.headers["vlmq-next-after"], answer.headers["vlmq-complete"]
    assert [row["custom_id"] for row in found] == ["00.jpg", "03.jpg", "06.jpg"]


@pytest.mark.parametrize(
    ("quality", "param"),
    [
        ({"language": "klingon"}, "quality.language"),
        ({"checks": []}, "quality.checks"),
        ({"checks": ["ugly"]}, "quality.checks[0]"),
        ({"resamples": 9}, "quality.resamples"),
        ({"retries": 1}, "quality.retries"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(
    node: RunningNode, images: Path, quality: dict[str, Any], param: str
) -> None:
    """Before there is a batch."""
    body = {"model": "echo", "images": str(images), "prompt": "x", "quality": quality}
    answer = httpx.post(f"{node.base_url}/captions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def vlmq(node: RunningNode, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run it to its end; returns standard output and standard error."""
    process = node.vlmq(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    return out, err


def test_the_command_line_says_what_the_gate_found(node: RunningNode, images: Path) -> None:
    """While watching, and caption by caption."""
    captions = {"a": "[[echo:blank]]", "b": "[[echo:refuse]]", "c": "fine", "d": "[[echo:error]]"}
    folder = str(fill(images / "cli", captions))
    asked = ("--model", "echo", "--template", "{txt}", "--language", "en", "--resamples", "1")
    out, err = vlmq(node, "caption", folder, *asked, "--watch", "--json")
    found = json.loads(out)
    assert "failed: engine_error 1" in err
    assert "to review: 2 (empty 1, refusing 1)" in err
    assert "images/s" in err
    [made_by] = httpx.get(f"{node.base_url}/batches/{found['id']}/provenance").json()["data"]
    assert made_by["quality"] == {"language": "en", "resamples": 1}
    assert (made_by["model"], made_by["template"]) == ("echo", "{txt}")
    assert f"made by: echo (revision 1), prompt {made_by['prompt_sha256'][:12]}, no seed" in err
    out, _ = vlmq(node, "batch", "review", found["id"])
    refusal = "I'm sorry, but I can't help with that image."
    assert out.splitlines() == ["a.jpg: empty: ", f"b.jpg: refusing: {refusal}"]
    out, _ = vlmq(node, "batch", "review", found["id"], "--json")
    assert [json.loads(line)["custom_id"] for line in out.splitlines()] == ["a.jpg", "b.jpg"]


def test_a_set_that_is_captioned_again_keeps_its_verdicts(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """What is to be reviewed is so again, of doubles too; another gate asks anew."""
    folder = fill(images / "synced", {"good": "a red circle", "blank": "[[echo:blank]]"})
    write(folder / "same.jpg", jpeg(1))
    write(folder / "same.txt", "[[echo:blank]]")
    gated = {"sync": True, "quality": {"resamples": 1}}
    first = captioned(node, sdk, folder, **gated)
    again = captioned(node, sdk, folder, **gated)
    judged = {"verdict": "review", "reasons": ["empty"], "resampled": [["empty"]]}
    rows = by_name(results(sdk, first.output_file_id))
    assert rows["blank"]["vlmq"] == {"quality": judged}
    assert rows["same"]["vlmq"] == {"quality": judged, "same_as": "blank.jpg"}
    rows = by_name(results(sdk, again.output_file_id))
    assert rows["good"]["vlmq"] == {"quality": {"verdict": "pass"}, "captioned_in": first.id}
    assert rows["blank"]["vlmq"] == {"quality": judged, "captioned_in": first.id}
    assert again.usage.total_tokens == 0
    for ended, thrown_away in ((first, 1), (again, 0)):
        counted = ended.vlmq["quality"]
        assert counted["review"] == {"captions": 2, "reasons": {"empty": 2}}
        assert counted["resampled"]["captions"] == thrown_away
        assert sorted(by_name(reviewed(node, ended.id))) == ["blank", "same"]
    ungated = captioned(node, sdk, folder, sync=True)
    assert ungated.vlmq["sync"] == {"known": 0, "duplicates": 1, "passed": 0}


def test_a_sample_is_not_synced(node: RunningNode, images: Path) -> None:
    """It says so, and does not count for the set."""
    body = {"model": "echo", "images": str(images), "prompt": "say it", "sample": {}}
    answer = httpx.post(f"{node.base_url}/captions", json={**body, "sync": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "sample"


def test_an_image_that_kills_engines_does_not_let_others_past_the_gate(
    node: RunningNode, sdk: openai.OpenAI, images: Path
) -> None:
    """Whoever was in the engine with it is judged as well, and has one line."""
    captions = {f"{number:02}": "[[echo:blank]]" for number in range(12)}
    captions |= {"fine": "a red circle", "poison": "[[echo:kill]]"}
    ended = captioned(node, sdk, fill(images / "poison", captions), quality={"resamples": 2})
    assert ended.status == "completed"
    rows = by_name(results(sdk, ended.output_file_id))
    assert sorted(rows) == sorted(set(captions) - {"poison"})
    assert rows["fine"]["vlmq"]["quality"] == {"verdict": "pass"}
    blank = [
        rows[name]["vlmq"]["quality"] for name in captions if captions[name] == "[[echo:blank]]"
    ]
    assert {found["verdict"] for found in blank} == {"review"}
    assert ended.vlmq["failures"] == {"engine_crashed": 1}
    assert ended.vlmq["quality"]["review"] == {"captions": 12, "reasons": {"empty": 12}}
