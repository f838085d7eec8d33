"""What is counted when, on a real Valkey; who may read it; what a hostile name can do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.metrics import render
from shared.errors import LeaseLost, QueueUnavailable, from_code
from shared.finetune_store import STEP_SECONDS, FinetuneLease, NewEvent
from shared.finetunes import FinetuneState
from shared.jobs import BatchState
from shared.metrics import (
    BATCH_ITEMS,
    BATCHES_CREATED,
    BATCHES_ENDED,
    CHAT_ERRORS,
    CHATS,
    IMAGES,
    LEASES_REAPED,
    TOKENS,
    Metric,
    counted,
)
from shared.presence import FinetuneReport, GpuReport, NodeReport, ReplicaReport
from shared.shards import ShardHeader
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.finetune_steps import BASE, create, now, running
from tests.integration.api_server import ApiServer, StartApi
from tests.running_node import wait_for
from tests.scraped import Scrape, scrape
from tests.stored_batches import LANE, MODEL, claim, commit, planned, run_control

HEADER = ShardHeader(0, 0, completed=3, failed=1, prompt_tokens=50, completion_tokens=7, images=5)


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores without a node, that cut a chunk for each line: the test does every step."""
    settings = store_settings(redis_url, tmp_path, queue={"chunk_items": 1})
    with connected(settings) as found:
        yield found


def values(stores: Stores, metric: Metric) -> dict[tuple[str, ...], int]:
    """A counter as it is in Redis."""
    return counted(stores.gauges.read().counters, metric)


def page(stores: Stores) -> Scrape:
    """The text that the API would answer with."""
    return Scrape(render(stores.gauges.read(), stores.settings).decode())


# --- batches ----------------------------------------------------------------------------------


def test_a_commit_that_is_sent_twice_counts_once(stores: Stores) -> None:
    """As after an answer of Redis that was lost on its way."""
    planned(stores, 2)
    lease = claim(stores)
    for _ in range(2):
        stores.batches.committed(lease, HEADER, [])
    assert values(stores, BATCH_ITEMS) == {(MODEL, "completed"): 3, (MODEL, "failed"): 1}
    tokens = {(MODEL, "batch", "prompt"): 50, (MODEL, "batch", "completion"): 7}
    assert values(stores, TOKENS) == tokens
    assert values(stores, IMAGES) == {(MODEL, "batch"): 5}


def test_a_commit_that_came_too_late_does_not_count(stores: Stores) -> None:
    """The one who has the lease now does."""
    planned(stores, 1)
    late = claim(stores)
    stores.redis.zadd("vlmq:leases", {f"{late.batch_id}|{late.unit}": 1})
    stores.leases.reap()
    with pytest.raises(LeaseLost):
        stores.batches.committed(late, HEADER, [])
    assert values(stores, BATCH_ITEMS) == {}
    commit(stores, claim(stores))
    assert values(stores, BATCH_ITEMS) == {(MODEL, "completed"): 1}


def test_leases_that_are_taken_back_are_counted_by_reason(stores: Stores) -> None:
    """Silent past their time, or held by a process that is dead."""
    planned(stores, 3)
    silent = claim(stores)
    claim(stores, "dead")
    claim(stores, "dead")
    stores.redis.zadd("vlmq:leases", {f"{silent.batch_id}|{silent.unit}": 1})
    stores.leases.reap(["dead"])
    assert values(stores, LEASES_REAPED) == {("expired",): 1, ("worker_died",): 2}
    stores.leases.reap(["dead"])
    assert values(stores, LEASES_REAPED) == {("expired",): 1, ("worker_died",): 2}


def test_lines_that_were_never_run_are_told_apart(stores: Stores) -> None:
    """Two of five were done when the batch was cancelled."""
    batch = planned(stores, 5)
    commit(stores, claim(stores))
    commit(stores, claim(stores), completed=0, failed=1)
    stores.batches.cancel("ann", batch.id)
    run_control(stores)
    assert stores.batches.get("ann", batch.id).state == BatchState.CANCELLED
    assert values(stores, BATCH_ITEMS) == {
        (MODEL, "completed"): 1,
        (MODEL, "failed"): 1,
        (MODEL, "never_run"): 3,
    }
    assert values(stores, BATCHES_CREATED) == {(): 1}
    assert values(stores, BATCHES_ENDED) == {("cancelled",): 1}


def test_a_batch_that_waits_is_told_with_its_age(stores: Stores) -> None:
    """By creation, and by when something of it was last taken."""
    batch = planned(stores, 4)
    stores.redis.zadd(f"vlmq:created:{LANE}", {batch.id: (time.time() - 500) * 1000})
    stores.redis.hset(f"vlmq:batch:{batch.id}", "created_ms", int((time.time() - 500) * 1000))
    stores.redis.zadd(f"vlmq:touched:{LANE}", {batch.id: (time.time() - 400) * 1000})
    seen = page(stores)
    assert seen.value("vlmq_batch_chunks_waiting", model=MODEL) == 4
    assert 500 <= seen.value("vlmq_batch_oldest_age_seconds", model=MODEL) < 600
    assert 400 <= seen.value("vlmq_batch_longest_wait_seconds", model=MODEL) < 500
    claim(stores)
    seen = page(stores)
    assert seen.value("vlmq_batch_chunks_waiting", model=MODEL) == 3
    assert seen.value("vlmq_batch_chunks_held", model=MODEL) == 1
    assert seen.value("vlmq_leases_held") == 1
    assert 500 <= seen.value("vlmq_batch_oldest_age_seconds", model=MODEL) < 600
    assert seen.value("vlmq_batch_longest_wait_seconds", model=MODEL) < 400


def test_a_rebuilt_redis_counts_from_zero_and_knows_what_waits(stores: Stores) -> None:
    """Counters are Redis's; queues follow from shared storage."""
    planned(stores, 6)
    commit(stores, claim(stores))
    before = page(stores)
    stores.redis.flushall()
    stores.rebuild()
    after = page(stores)
    assert values(stores, BATCH_ITEMS) == {}
    for name in ("vlmq_batch_chunks_waiting", "vlmq_batch_chunks_held"):
        assert after.value(name, model=MODEL) == before.value(name, model=MODEL)
    assert after.by("vlmq_batches", "state") == before.by("vlmq_batches", "state")


def test_asking_does_not_cost_more_when_more_waits(stores: Stores) -> None:
    """The same commands for one batch as for forty of a hundred lines."""

    def commands() -> int:
        before = stores.redis.info("stats")["total_commands_processed"]
        stores.gauges.read()
        return int(stores.redis.info("stats")["total_commands_processed"] - before)

    planned(stores, 1)
    few = commands()
    for _ in range(39):
        planned(stores, 100)
    assert stores.gauges.read().lanes[MODEL].waiting == 1 + 39 * 100
    assert commands() == few


# --- chats ------------------------------------------------------------------------------------


def test_refused_chats_are_counted_too(stores: Stores) -> None:
    """Though they never had an id in Redis."""
    for _ in range(2):
        with pytest.raises(from_code_type("model_unavailable")):
            stores.chats.submit(owner="ann", model=MODEL, body=b"{}", timeout_s=5)
    failed = {(MODEL, "model_unavailable"): 2}
    wait_for(lambda: values(stores, CHAT_ERRORS) == failed, "the count", 10)
    assert values(stores, CHATS) == {(MODEL, "failed"): 2}


def from_code_type(code: str) -> type[Exception]:
    """The class of an error."""
    return type(from_code(code, ""))


def test_what_redis_did_not_hear_is_told_later(stores: Stores) -> None:
    """And once."""

    def tell_in_vain() -> None:
        with stores.chats.counts.told():
            raise QueueUnavailable()

    stores.chats.counts.add(CHATS, MODEL, "completed", by=2)
    with pytest.raises(QueueUnavailable):
        tell_in_vain()
    stores.chats.counts.add(CHATS, MODEL, "completed")
    stores.chats.close()
    stores.chats.close()
    assert values(stores, CHATS) == {(MODEL, "completed"): 3}


def test_what_is_counted_while_redis_is_away_takes_no_room(tmp_path: Path) -> None:
    """Only the sums are kept."""
    away = store_settings(f"unix://{tmp_path}/nobody.sock", tmp_path)
    with connected(away) as cut_off:
        for _ in range(1000):
            with pytest.raises(QueueUnavailable):
                cut_off.chats.submit(owner="ann", model=MODEL, body=b"{}", timeout_s=5)
        with pytest.raises(QueueUnavailable), cut_off.chats.counts.told() as pending:
            assert dict(pending) == {
                f"vlmq_chat_requests_total|{MODEL}|failed": 1000,
                f"vlmq_chat_errors_total|{MODEL}|queue_unavailable": 1000,
            }
            raise QueueUnavailable


# --- fine-tunes -------------------------------------------------------------------------------


def test_fine_tunes_are_told_by_state(stores: Stores) -> None:
    """Each once, also if its last step is sent twice; and after a rebuild."""
    done, taken_back = running(stores), running(stores, worker="dead")
    for _ in range(2):
        stores.finetunes.move(done, FinetuneState.SUCCEEDED, message="Done")
    paused = create(stores)
    stores.finetunes.want("ann", paused.id, "pause")
    stores.finetunes.want("ann", create(stores).id, "cancel")
    assert page(stores).value("vlmq_finetunes", state="running") == 1
    stores.finetunes.reap(["dead"])
    seen = page(stores)
    live = {"validating_files": 0, "queued": 1, "running": 0, "paused": 1}
    assert seen.by("vlmq_finetunes", "state") == live
    assert now(stores, taken_back.job).state == FinetuneState.QUEUED
    ended = {"succeeded": 1, "failed": 0, "cancelled": 1}
    assert seen.by("vlmq_finetunes_ended_total", "state") == ended
    assert seen.value("vlmq_finetunes_created_total") == 4
    reaped = {"expired": 0, "worker_died": 1}
    assert seen.by("vlmq_finetune_leases_reaped_total", "reason") == reaped
    stores.redis.flushall()
    stores.rebuild()
    assert page(stores).by("vlmq_finetunes", "state") == live


def test_a_training_steps_time_is_told_while_it_trains(stores: Stores) -> None:
    """The longest of a base model's, and nothing when none trains."""

    def tell(lease: FinetuneLease, step: int, seconds: float) -> None:
        data = {"step": step, STEP_SECONDS: seconds}
        event = NewEvent("Step", type="metrics", data=data)
        stores.finetunes.add_events(lease, [event])

    assert page(stores).by("vlmq_finetune_step_seconds", "model") == {}
    slow, quick = running(stores), running(stores)
    tell(slow, 10, 9.5)
    tell(slow, 20, 2.5)
    tell(quick, 10, 0.5)
    assert page(stores).by("vlmq_finetune_step_seconds", "model") == {BASE: 2.5}
    stores.finetunes.release(slow)
    assert page(stores).by("vlmq_finetune_step_seconds", "model") == {BASE: 0.5}
    stores.finetunes.move(quick, FinetuneState.FAILED, message="Disk")
    assert page(stores).by("vlmq_finetune_step_seconds", "model") == {}


def test_gpus_for_fine_tunes_are_told_by_node(stores: Stores) -> None:
    """Where fine-tunes run; other nodes have no such series."""
    report = FinetuneReport(gpus_total=4, gpus_free=3, running=["ftjob-1"])
    stores.presence.announce(NodeReport("trains", int(time.time()), finetune=report), ttl_s=60)
    stores.presence.announce(NodeReport("serves", int(time.time())), ttl_s=60)
    seen = page(stores)
    assert seen.by("vlmq_finetune_gpus", "node").keys() == {"trains"}
    assert seen.by("vlmq_finetune_gpus", "state") == {"free": 3, "taken": 1}


# --- nodes ------------------------------------------------------------------------------------

HOSTILE = 'a"} 1\nvlmq_nodes 99\n\\{x="\ny'


def test_names_cannot_break_out_of_their_labels(stores: Stores) -> None:
    """Quotes, newlines and backslashes of a node's name or a program's stay inside."""
    replicas = [ReplicaReport(HOSTILE, 0, "ready"), ReplicaReport(HOSTILE, 1, "failed", restarts=3)]
    report = NodeReport(HOSTILE, int(time.time()), replicas, {HOSTILE: "ready"})
    stores.presence.announce(report, ttl_s=60)
    seen = page(stores)
    assert seen.value("vlmq_nodes") == 1
    assert seen.value("vlmq_program_ready", node=HOSTILE, program=HOSTILE) == 1
    by_state = seen.by("vlmq_replicas", "state")
    others = dict.fromkeys(("starting", "restarting", "stopping", "unloaded", "lent"), 0)
    assert by_state == {"ready": 1, "failed": 1, **others}
    labels = {"node": HOSTILE, "model": HOSTILE, "replica": "1"}
    assert seen.value("vlmq_replica_restarts_total", **labels) == 3


def test_gpus_are_told_by_node_and_number(stores: Stores) -> None:
    """One that does not tell how busy it is has no such series."""
    gpus = [GpuReport(0, 10 << 30, 80 << 30, 0.75), GpuReport(1, 5, 7)]
    stores.presence.announce(NodeReport("n", int(time.time()), gpus=gpus), ttl_s=60)
    seen = page(stores)
    assert seen.by("vlmq_gpu_memory_used_bytes", "gpu") == {"0": 10 << 30, "1": 5}
    assert seen.by("vlmq_gpu_memory_total_bytes", "gpu") == {"0": 80 << 30, "1": 7}
    assert seen.by("vlmq_gpu_utilisation_ratio", "gpu") == {"0": 0.75}


def test_fields_of_another_version_are_passed_over(stores: Stores) -> None:
    """Two versions may run side by side for a while."""
    stores.redis.hset("vlmq:metrics", "vlmq_of_tomorrow_total|x", 5)
    stores.redis.hset("vlmq:metrics", "vlmq_batch_items_total|x|y|z", 5)
    stores.redis.hset("vlmq:metrics", "vlmq_batch_items_total|m|completed", 5)
    assert values(stores, BATCH_ITEMS) == {("m", "completed"): 5}
    assert "tomorrow" not in page(stores).text


# --- who may ask ------------------------------------------------------------------------------


def ask(server: ApiServer, owner: str | None, path: str = "/metrics") -> int:
    """The status that an owner's key gets."""
    headers = {"authorization": f"Bearer {server.secrets[owner]}"} if owner else {}
    answer = httpx.get(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    if answer.status_code != 200:
        assert "vlmq_" not in answer.text
    return answer.status_code


@pytest.mark.parametrize(
    ("readers", "statuses"),
    [
        ("metrics", {None: 401, "ann": 403, "metrics": 200}),
        ("owners", {None: 401, "ann": 200, "metrics": 200}),
        ("anyone", {None: 200, "ann": 200, "metrics": 200}),
    ],
)
def test_who_may_read_is_a_setting(
    start_api: StartApi, readers: str, statuses: dict[str | None, int]
) -> None:
    """However the address is written; and it opens no other address."""
    with start_api(owners=("ann", "metrics"), metrics_readers=readers) as server:
        for owner, status in statuses.items():
            assert ask(server, owner) == status
            assert ask(server, owner, "/metrics/") == status
            assert ask(server, owner, "/%6Detrics") == status
        assert ask(server, None, "/v1/models") == 401
        assert ask(server, None, "/metrics/x") == 401


@pytest.fixture
def open_api(start_api: StartApi) -> Iterator[ApiServer]:
    """A server without keys, on this machine only."""
    with start_api(metrics_readers="anyone") as server:
        yield server


def test_without_keys_only_this_machine_may_read(open_api: ApiServer) -> None:
    """Even if anyone may: a web page must not learn it by way of a browser."""
    assert scrape(open_api.port).value("vlmq_nodes") == 0
    url = f"http://127.0.0.1:{open_api.port}/metrics"
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(url, headers={"x-forwarded-for": "1.2.3.4"}).status_code == 401


def test_without_redis_it_says_so_and_works_again_afterwards(open_api: ApiServer) -> None:
    """A 503 with a reason, never half an answer."""
    url = f"http://127.0.0.1:{open_api.port}/metrics"
    open_api.stop_redis()
    answer = httpx.get(url, timeout=30)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "queue_unavailable"
    assert answer.headers["retry-after"]
    open_api.start_redis()
    wait_for(lambda: httpx.get(url).status_code == 200, "an answer", 20)


def test_a_parameter_is_an_error_that_names_it(open_api: ApiServer) -> None:
    """As everywhere."""
    answer = httpx.get(f"http://127.0.0.1:{open_api.port}/metrics?name[]=up")
    assert answer.status_code == 400
    assert "name[]" in answer.json()["error"]["message"]
