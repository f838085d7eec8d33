"""Lines read while a batch runs, through kills and restarts, and a retry of those that failed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.faults.batches import (
    RECOVERY_LIMIT_S,
    line,
    numbered,
    results,
    submit,
    wait_until_done,
    wait_until_ended,
)
from tests.running_node import RunningNode, running_node, wait_for

ITEMS = 1_500
READ_LIMIT_S = 90.0

SLOW_ECHO = {
    "model": "echo",
    "engine": "echo",
    "replicas": 2,
    "max_running": 16,
    "options": {"delay_s": 0.05, "faults": True},
}
FAST = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "chunk_items": 64, "drain_s": 5}


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """A node slow enough to have a middle."""
    with running_node(models=(SLOW_ECHO,), queue=FAST) as running:
        yield running


@pytest.fixture
def sdk(node: RunningNode) -> openai.OpenAI:
    """The SDK, patient with a server that is away for a moment."""
    return node.sdk(max_retries=8)


def ask(node: RunningNode, batch_id: str, **query: Any) -> httpx.Response:
    """One page, whole."""
    return httpx.get(f"{node.base_url}/batches/{batch_id}/results", params=query, timeout=30)


def rows_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Its lines."""
    return [json.loads(row) for row in response.text.splitlines()]


class Reader:
    """A client that goes on from the cursor it got last."""

    def __init__(self, node: RunningNode, batch_id: str, *, limit: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.complete = False
        self._node = node
        self._batch_id = batch_id
        self._limit = limit
        self._after = "0"

    def poll(self) -> bool:
        """Take what there is; says whether that was all. The server may be away."""
        try:
            response = ask(self._node, self._batch_id, after=self._after, limit=self._limit)
        except httpx.TransportError:
            return False
        if response.status_code == 503:
            return False
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/x-ndjson"
        found = rows_of(response)
        assert len(found) <= self._limit
        self.rows += found
        self._after = response.headers["vlmq-next-after"]
        self.complete = response.headers["vlmq-complete"] == "true"
        return self.complete

    def read_to_the_end(self) -> list[dict[str, Any]]:
        """Poll until nothing more will come."""
        wait_for(self.poll, "the last line", READ_LIMIT_S, lambda: f"{len(self.rows)} lines")
        return self.rows


def ids_of(rows: list[dict[str, Any]]) -> list[str]:
    """Whose lines these are, in their order."""
    return [row["custom_id"] for row in rows]


def all_ids(count: int = ITEMS) -> list[str]:
    """Those of a numbered batch."""
    return [f"item-{number}" for number in range(count)]


def test_every_line_is_read_once_while_a_consumer_child_is_killed(
    node: RunningNode, sdk: openai.OpenAI
) -> None:
    """In the order of the input, from the first chunk on, over the end of the batch, and again."""
    batch = submit(sdk, numbered(ITEMS))
    reader = Reader(node, batch.id, limit=50)
    wait_for(lambda: reader.poll() or len(reader.rows) > 100, "the first lines", 30)
    assert not reader.complete
    assert sdk.batches.retrieve(batch.id).status == "in_progress"
    os.kill(node.batch_children()[0], signal.SIGKILL)
    assert ids_of(reader.read_to_the_end()) == all_ids()
    assert ids_of(Reader(node, batch.id, limit=7_000).read_to_the_end()) == all_ids()
    ended = wait_until_ended(sdk, batch.id, RECOVERY_LIMIT_S)
    by_id = {row["id"]: row for row in results(sdk, ended.output_file_id)}
    assert {row["id"]: row for row in reader.rows} == by_id


def test_a_follower_outlives_the_server(
    node: RunningNode, sdk: openai.OpenAI, tmp_path: Path
) -> None:
    """The API is killed; ``vlmq batch results --follow`` has every line once, in order."""
    batch = submit(sdk, numbered(ITEMS))
    target = tmp_path / "lines.jsonl"
    process = node.vlmq("batch", "results", batch.id, "--follow", "-o", str(target))
    reader = Reader(node, batch.id, limit=100)
    wait_for(lambda: target.exists() and target.stat().st_size > 0, "a line", 30)
    servers = node.pids("api.server")
    for pid in servers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not set(servers) & set(node.pids("api.server")), "the API's end", 15)
    assert ids_of(reader.read_to_the_end()) == all_ids()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert ids_of([json.loads(row) for row in target.read_text().splitlines()]) == all_ids()
    assert f"completed: {ITEMS}/{ITEMS}" in err


def test_a_follower_that_was_interrupted_goes_on(
    node: RunningNode, sdk: openai.OpenAI, tmp_path: Path
) -> None:
    """Ctrl-C leaves the batch running and says how to go on; failed lines go where they should."""
    texts = numbered(ITEMS)
    texts[3] = texts[700] = "no json"
    batch = submit(sdk, texts)
    files = ("-o", str(tmp_path / "out"), "--errors", str(tmp_path / "err"))
    process = node.vlmq("batch", "results", batch.id, "--follow", *files)
    out = tmp_path / "out"
    wait_for(lambda: out.exists() and out.stat().st_size > 0, "a line", 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert sdk.batches.retrieve(batch.id).status == "in_progress"
    after = err.split("--after ")[1].split()[0]
    process = node.vlmq("batch", "results", batch.id, "--follow", "--after", after, *files)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    expected = [name for name in all_ids() if name not in ("item-3", "item-700")]
    assert ids_of([json.loads(row) for row in out.read_text().splitlines()]) == expected
    failed = [json.loads(row) for row in (tmp_path / "err").read_text().splitlines()]
    assert [row["id"].rpartition("_")[2] for row in failed] == ["4", "701"]


def test_what_is_asked_wrongly_is_refused_by_name(node: RunningNode, sdk: openai.OpenAI) -> None:
    """Cursors, bounds, and batches that are not there."""
    batch = submit(sdk, numbered(20))
    wait_until_ended(sdk, batch.id)
    wrong = [("after", value) for value in ("-1", "x", "21", str(2**63), "")]
    wrong += [("limit", value) for value in ("0", "100001", "many")]
    for name, value in wrong:
        answer = ask(node, batch.id, **{name: value})
        assert answer.status_code == 400, (name, value)
        assert answer.json()["error"]["param"] == name
    assert ask(node, batch.id, cursor="1").json()["error"]["param"] == "cursor"
    assert ask(node, "batch_000000000000000000000000").status_code == 404
    assert ask(node, "..").status_code == 404
    last = ask(node, batch.id, after=20)
    assert (last.status_code, last.content) == (200, b"")
    assert last.headers["vlmq-complete"] == "true"


def test_failed_lines_are_retried_end_to_end(node: RunningNode, sdk: openai.OpenAI) -> None:
    """Only they, once per key; then nothing is left to retry."""
    texts = [*numbered(30), line("later", "say 30", temperature=9), "no json"]
    batch = submit(sdk, texts, metadata={"who": "me"})
    wait_until_ended(sdk, batch.id)
    url = f"{node.base_url}/batches/{batch.id}/retry"
    key = {"idempotency-key": f"again-{batch.id}"}
    first, second = httpx.post(url, headers=key), httpx.post(url, headers=key)
    assert first.status_code == 200, first.text
    assert second.json() == first.json()
    assert second.headers["idempotent-replayed"] == "true"
    made = first.json()
    assert made["vlmq"]["retry_of"] == batch.id
    assert made["metadata"] == {"who": "me"}
    assert sdk.files.content(made["input_file_id"]).text.splitlines() == texts[30:]
    again = wait_until_ended(sdk, made["id"])
    assert again.request_counts is not None
    assert (again.request_counts.total, again.request_counts.failed) == (2, 2)
    clean = submit(sdk, numbered(3))
    wait_until_ended(sdk, clean.id)
    refused = httpx.post(f"{node.base_url}/batches/{clean.id}/retry")
    assert refused.status_code == 400
    assert "nothing to retry" in refused.json()["error"]["message"]
    process = node.vlmq("batch", "retry", clean.id)
    assert "nothing to retry" in process.communicate(timeout=30)[1]
    assert process.returncode == 1


def test_a_stopped_batch_is_taken_up_again(node: RunningNode, sdk: openai.OpenAI) -> None:
    """``vlmq batch retry --watch`` of a cancelled batch runs what never ran, and completes."""
    batch = submit(sdk, numbered(ITEMS))
    wait_until_done(sdk, batch.id, 100)
    running = httpx.post(f"{node.base_url}/batches/{batch.id}/retry")
    assert (running.status_code, running.json()["error"]["code"]) == (400, "illegal_transition")
    sdk.batches.cancel(batch.id)
    wait_until_ended(sdk, batch.id)
    rows = Reader(node, batch.id, limit=400).read_to_the_end()
    assert ids_of(rows) == all_ids()
    never = [row["custom_id"] for row in rows if row["error"] is not None]
    process = node.vlmq("batch", "retry", batch.id, "--watch", "--json")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    again = sdk.batches.retrieve(json.loads(out)["id"])
    assert sorted(ids_of(results(sdk, again.output_file_id))) == sorted(never)
    assert 0 < len(never) < ITEMS
