"""``/metrics`` of a whole node that has done a known amount of work."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch
from PIL import Image

from shared.keys import KeyStore
from shared.metrics import METRICS
from shared.process import free_port, parent_of
from shared.storage import Layout
from tests.faults.batches import line, results, submit, wait_until_ended
from tests.running_node import RunningNode, running_node, wait_for
from tests.scraped import Scrape, scrape

OWNER = "acme-corporation"
SECRET_WORDS = "nobody-should-read-this"
LIMIT_S = 30.0
VARYING = ("vlmq_storage_", "vlmq_chat_open", "vlmq_batch_control_longest")


@dataclass
class Worked:
    """A node and what it did: one batch, and chats of each kind."""

    node: RunningNode
    keys: dict[str, str]
    batch: Batch
    chat_tokens: dict[str, int]
    error_code: str

    def scrape(self, port: int | None = None) -> Scrape:
        """What it says of itself now."""
        return scrape(port or self.node.port, self.keys["metrics"])

    def sdk(self) -> openai.OpenAI:
        """The SDK with the owner's key, which sends nothing twice."""
        return self.node.sdk(self.keys[OWNER], max_retries=0)


def picture() -> str:
    """A small image as a URL."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def about(text: str, *urls: str) -> Any:
    """A conversation about images."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def batch_lines() -> list[str]:
    """300 lines: 280 of text, 10 with two images each, 6 with a wrong field, 4 that the engine fails."""
    with_images = {"model": "echo", "messages": about("see", picture(), picture())}
    envelope = {"method": "POST", "url": "/v1/chat/completions", "body": with_images}
    return [
        *(line(f"text-{number}", f"{SECRET_WORDS} {number}") for number in range(280)),
        *(json.dumps({"custom_id": f"image-{n}", **envelope}) for n in range(10)),
        *(line(f"wrong-{number}", "x", temperature=9) for number in range(6)),
        *(line(f"error-{number}", "[[echo:error]]") for number in range(4)),
    ]


def stream(sdk: openai.OpenAI, messages: Any) -> openai.types.CompletionUsage:
    """A streamed answer, read to its end."""
    chunks = list(
        sdk.chat.completions.create(
            model="echo",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks[-1].usage
    assert usage is not None
    return usage


def chat(sdk: openai.OpenAI, text: str) -> openai.types.CompletionUsage:
    """A whole answer."""
    answer = sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}])
    assert answer.usage is not None
    return answer.usage


@pytest.fixture(scope="module")
def worked() -> Iterator[Worked]:
    """Three plain chats, two streams with three images, one failure, one client that leaves."""
    with running_node() as node:
        store = KeyStore(Layout(node.settings.data_dir).keys)
        keys = {owner: store.create(owner)[1] for owner in (OWNER, "metrics")}
        sdk = node.sdk(keys[OWNER], max_retries=0)
        batch = wait_until_ended(sdk, submit(sdk, batch_lines()).id)
        usages = [chat(sdk, f"{SECRET_WORDS} {number}") for number in range(3)]
        usages.append(stream(sdk, about("one", picture())))
        usages.append(stream(sdk, about("two", picture(), picture())))
        with pytest.raises(openai.BadRequestError) as refused:
            chat_about_nothing(sdk)
        left = sdk.chat.completions.create(
            model="echo", messages=about("word [[echo:sleep=20]]"), stream=True
        )
        left.response.close()
        tokens = {
            "prompt": sum(usage.prompt_tokens for usage in usages),
            "completion": sum(usage.completion_tokens for usage in usages),
        }
        done = Worked(node, keys, batch, tokens, str(refused.value.code))
        wait_for(lambda: done.scrape().value("vlmq_chat_open") == 0, "the last chat's end", LIMIT_S)
        yield done


def chat_about_nothing(sdk: openai.OpenAI) -> None:
    """Ask about an image that is none."""
    broken = "data:image/png;base64,bm90IGFuIGltYWdl"
    sdk.chat.completions.create(model="echo", messages=about("what?", broken))


def test_lines_images_and_tokens_of_batches_are_counted(worked: Worked) -> None:
    """Each once, as the batch object and its files have them."""
    seen, batch = worked.scrape(), worked.batch
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (290, 10)
    items = seen.by("vlmq_batch_items_total", "outcome")
    assert items == {"completed": 290, "failed": 10, "never_run": 0}
    assert seen.value("vlmq_images_total", model="echo", work="batch") == 20
    usage = [
        row["response"]["body"]["usage"] for row in results(worked.sdk(), batch.output_file_id)
    ]
    for kind in ("prompt", "completion"):
        told = seen.value("vlmq_tokens_total", model="echo", work="batch", kind=kind)
        assert told == sum(one[f"{kind}_tokens"] for one in usage) > 0
    assert seen.value("vlmq_batches_created_total") == 1
    ended = seen.by("vlmq_batches_ended_total", "state")
    assert ended == {"completed": 1, "failed": 0, "expired": 0, "cancelled": 0}


def test_chats_are_counted_by_how_they_ended(worked: Worked) -> None:
    """Five answered, one refused by the consumer, one whose client left."""
    seen = worked.scrape()
    outcomes = seen.by("vlmq_chat_requests_total", "outcome")
    assert outcomes == {"completed": 5, "failed": 1, "aborted": 1}
    assert seen.by("vlmq_chat_errors_total", "code") == {worked.error_code: 1}
    assert worked.error_code.startswith("image_")
    assert seen.value("vlmq_images_total", model="echo", work="chat") == 3
    for kind, tokens in worked.chat_tokens.items():
        assert seen.value("vlmq_tokens_total", model="echo", work="chat", kind=kind) == tokens


def test_times_are_histograms(worked: Worked) -> None:
    """One first text for each answer, and a duration; the buckets add up and agree with the sum."""
    seen = worked.scrape()
    for name in ("vlmq_chat_first_token_seconds", "vlmq_chat_duration_seconds"):
        buckets = seen.by(f"{name}_bucket", "le")
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets["+Inf"] == seen.value(f"{name}_count", model="echo") == 5
        least = sum(
            (buckets[above] - buckets[below]) * float(below)
            for below, above in zip(list(buckets), list(buckets)[1:], strict=False)
        )
        assert seen.value(f"{name}_sum", model="echo") >= least
    first = seen.value("vlmq_chat_first_token_seconds_sum", model="echo")
    assert 0 < first <= seen.value("vlmq_chat_duration_seconds_sum", model="echo")


def test_nothing_waits_when_all_is_done(worked: Worked) -> None:
    """Queues, leases and ages are back at nought."""
    seen = worked.scrape()
    for name in ("chunks_waiting", "chunks_held", "oldest_age_seconds", "longest_wait_seconds"):
        assert seen.value(f"vlmq_batch_{name}", model="echo") == 0
    assert seen.value("vlmq_chat_waiting", model="echo") == 0
    assert seen.value("vlmq_batch_control_waiting") == 0
    assert seen.value("vlmq_leases_held") == 0
    assert set(seen.by("vlmq_batches", "state").values()) == {0}


def test_the_node_tells_of_itself(worked: Worked) -> None:
    """Its replicas, programs and disk."""
    seen, name = worked.scrape(), worked.node.settings.node.name
    assert seen.value("vlmq_replicas", node=name, model="echo", state="ready") == 1
    assert sum(seen.by("vlmq_replicas", "state").values()) == 1
    assert seen.value("vlmq_replica_restarts_total", node=name, model="echo", replica="0") == 0
    programs = {"redis": 1, "reaper": 1, "batch": 1, "chat": 1, "api": 1}
    assert seen.by("vlmq_program_ready", "program") == programs
    assert 0 < seen.value("vlmq_storage_free_bytes") <= seen.value("vlmq_storage_total_bytes")
    assert seen.value("vlmq_storage_min_free_bytes") == 256 << 20
    assert seen.value("vlmq_nodes") == 1


def test_every_metric_of_the_table_is_there_and_no_other(worked: Worked) -> None:
    """With the kind and the help of the table."""
    told = {family.name: (family.type, family.documentation) for family in worked.scrape().families}
    table = {metric.name.removesuffix("_total"): (metric.kind, metric.help) for metric in METRICS}
    assert told == table


def test_it_betrays_no_owner_no_prompt_and_no_key(worked: Worked) -> None:
    """Whoever reads it learns how much is done, not for whom or about what."""
    text = worked.scrape().text
    for secret in (OWNER, SECRET_WORDS, *worked.keys.values(), worked.batch.id, "text-1"):
        assert secret not in text


def test_two_api_processes_agree(worked: Worked) -> None:
    """What was asked of one is told by the other."""
    node = worked.node
    before = worked.scrape()
    port = free_port()
    config = node.folder / "second.json"
    values = json.loads(node.config.read_text())
    values["api"]["port"] = port
    config.write_text(json.dumps(values))
    second = subprocess.Popen(
        [sys.executable, "-m", "api.server", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: answers(port), "the second API", LIMIT_S)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=worked.keys[OWNER])
        chat(client, "by way of the second")
        wait_for(lambda: completed(worked) == completed_in(before) + 1, "the count", LIMIT_S)
        first, other = worked.scrape(), worked.scrape(port)
        for series, value in first.values.items():
            if not series[0].startswith(VARYING):
                assert other.values[series] == value, series
        assert first.values.keys() == other.values.keys()
    finally:
        second.terminate()
        second.wait(timeout=LIMIT_S)


def test_counters_go_on_when_the_api_is_restarted(worked: Worked) -> None:
    """Even what was counted in the moment before."""
    node = worked.node
    before = worked.scrape()
    chat(worked.sdk(), "just before the end")
    [server] = [pid for pid in api_pids(node) if parent_of(pid) not in api_pids(node)]
    os.kill(server, signal.SIGTERM)
    wait_for(lambda: server not in api_pids(node) and answers(node.port), "the API", LIMIT_S)
    after = worked.scrape()
    assert completed_in(after) == completed_in(before) + 1
    ahead = {
        series: value
        for series, value in before.values.items()
        if series[0].endswith(("_total", "_count", "_bucket")) and after.values[series] < value
    }
    assert ahead == {}


def test_a_replica_that_died_is_seen(worked: Worked) -> None:
    """In its restarts, and as a chat error; afterwards it is ready again."""
    node = worked.node
    with pytest.raises(openai.APIStatusError):
        chat(worked.sdk(), "[[echo:kill]]")

    def restarted() -> bool:
        seen = worked.scrape()
        ready = seen.value("vlmq_replicas", node=name, model="echo", state="ready") == 1
        labels = {"node": name, "model": "echo", "replica": "0"}
        return ready and seen.value("vlmq_replica_restarts_total", **labels) >= 1

    name = node.settings.node.name
    wait_for(restarted, "the replica's restart", LIMIT_S)
    wait_for(
        lambda: worked.scrape().by("vlmq_chat_errors_total", "code").get("engine_crashed") == 1,
        "the error",
        LIMIT_S,
    )


def api_pids(node: RunningNode) -> list[int]:
    """The API's own processes, without a second server's."""
    return node.pids("api.server", "settings.json")


def answers(port: int) -> bool:
    """Whether an API is up there."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def completed_in(seen: Scrape) -> float:
    """How many chats were answered."""
    return seen.value("vlmq_chat_requests_total", model="echo", outcome="completed")


def completed(worked: Worked) -> float:
    """How many chats were answered by now."""
    return completed_in(worked.scrape())
