"""Batches for fault tests: made, watched, and every line accounted for."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import openai
from openai.types import Batch

from tests.running_node import RunningNode, wait_for

ENDPOINT = "/v1/chat/completions"
RECOVERY_LIMIT_S = 30.0


def line(custom_id: str, content: str | list[Any], *, model: str = "echo", **body: Any) -> str:
    """One line of a batch file."""
    request = {
        "custom_id": custom_id,
        "method": "POST",
        "url": ENDPOINT,
        "body": {"model": model, "messages": [{"role": "user", "content": content}], **body},
    }
    return json.dumps(request)


def numbered(count: int) -> list[str]:
    """Lines ``item-0`` to ``item-<count - 1>``, each with a text of its own."""
    return [line(f"item-{number}", f"say {number}") for number in range(count)]


def submit(sdk: openai.OpenAI, lines: list[str], **fields: Any) -> Batch:
    """Upload the lines and make a batch of them."""
    content = "".join(f"{text}\n" for text in lines).encode()
    uploaded = sdk.files.create(file=("lines.jsonl", content), purpose="batch")
    return sdk.batches.create(
        input_file_id=uploaded.id, endpoint=ENDPOINT, completion_window="24h", **fields
    )


def done(batch: Batch) -> int:
    """How many lines have an answer or an error so far."""
    counts = batch.request_counts
    return counts.completed + counts.failed if counts else 0


def wait_until_done(sdk: openai.OpenAI, batch_id: str, at_least: int, limit_s: float = 60) -> None:
    """Wait until so many lines are done."""
    wait_for(
        lambda: done(sdk.batches.retrieve(batch_id)) >= at_least,
        f"{at_least} lines of {batch_id}",
        limit_s,
    )


def wait_until_ended(sdk: openai.OpenAI, batch_id: str, limit_s: float = 60) -> Batch:
    """Wait until the batch is in a terminal state and return it."""
    ended = {"completed", "failed", "cancelled", "expired"}
    wait_for(
        lambda: sdk.batches.retrieve(batch_id).status in ended,
        f"{batch_id} to end",
        limit_s,
        lambda: sdk.batches.retrieve(batch_id).model_dump_json(indent=1),
    )
    return sdk.batches.retrieve(batch_id)


def results(sdk: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    if file_id is None:
        return []
    text = sdk.files.content(file_id).text
    return [json.loads(row) for row in text.splitlines()]


def assert_each_answered_once(sdk: openai.OpenAI, batch: Batch, count: int) -> None:
    """Every line has exactly one answer, and it is its own."""
    assert batch.status == "completed", batch.model_dump_json(indent=1)
    rows = results(sdk, batch.output_file_id)
    seen = Counter(row["custom_id"] for row in rows)
    assert seen == Counter({f"item-{number}": 1 for number in range(count)})
    for row in rows:
        text = row["response"]["body"]["choices"][0]["message"]["content"]
        assert text == f"say {row['custom_id'].removeprefix('item-')}"
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (count, 0)


def assert_nothing_left(node: RunningNode) -> None:
    """After the node stopped, none of its processes is alive."""
    wait_for(lambda: node.pids() == [], "every process to end", 15, lambda: str(node.pids()))
