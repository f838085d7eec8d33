"""The reaper's turns on a real Valkey: what is taken back, topped up, ended and swept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.finetunes import FinetuneState
from shared.jobs import BatchState
from shared.process import start_ticks
from shared.queue import CONTROL_QUEUE, FINETUNE_QUEUE, batch_queue
from shared.settings import snapshot
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import numbered
from tests.finetune_steps import claim as claim_finetune
from tests.finetune_steps import create as create_finetune
from tests.finetune_steps import running
from tests.running_node import wait_for
from tests.stored_batches import claim, commit, jsonl, link_model, now, planned, record, upload
from workers.reaper import Reaper

TTL_S = 0.6


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores whose leases end soon, of a node with a run."""
    settings = store_settings(
        redis_url,
        tmp_path,
        queue={
            "chunk_items": 1,
            "lease_ttl_s": TTL_S,
            "renew_s": 0.2,
            "reap_s": 0.2,
            "ticket_window": 4,
        },
        node={"name": "here", "run_id": "run-1"},
    )
    with connected(settings) as found:
        yield found


@pytest.fixture
def reaper(stores: Stores) -> Reaper:
    """A reaper that leads and knows this Valkey."""
    found = Reaper(stores.settings, stores)
    found.turn()
    time.sleep(TTL_S)
    return found


def test_an_expired_lease_is_taken_back(stores: Stores, reaper: Reaper) -> None:
    """One that is renewed is not."""
    planned(stores, 2)
    lost, kept = claim(stores), claim(stores)
    time.sleep(TTL_S * 0.6)
    stores.leases.renew(kept)
    time.sleep(TTL_S * 0.6)
    reaper.turn()
    again = claim(stores)
    assert (again.unit, again.attempts) == (lost.unit, 1)
    assert stores.leases.renew(kept) is None


def test_after_a_restart_of_redis_holders_have_time_to_renew(stores: Stores) -> None:
    """They could not while it was away."""
    planned(stores, 1)
    lease = claim(stores)
    time.sleep(TTL_S + 0.1)
    reaper = Reaper(stores.settings, stores)
    reaper.turn()
    assert stores.leases.renew(lease) is None
    time.sleep(TTL_S + 0.1)
    reaper.turn()
    assert claim(stores).attempts == 1


def test_one_reaper_leads_and_another_takes_over(stores: Stores, reaper: Reaper) -> None:
    """When the first is gone for a while."""
    planned(stores, 2)
    claim(stores)
    other = Reaper(stores.settings, stores)
    time.sleep(TTL_S + 0.1)
    stores.redis.set("vlmq:reaper", "the first", px=600)
    other.turn()
    assert claim(stores).attempts == 0, "the one that does not lead reaped"
    time.sleep(0.7)
    other.turn()
    assert claim(stores).attempts == 1


def test_what_dead_processes_of_this_run_held_is_taken_back_at_once(
    stores: Stores, reaper: Reaper
) -> None:
    """Not what processes alive hold, nor what other nodes and earlier runs did."""
    planned(stores, 4)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{process.pid}:{start_ticks(process.pid)}"
    workers = [f"here:run-1:{name}", f"there:run-1:{name}", f"here:run-0:{name}"]
    for worker in workers:
        stores.leases.register(worker)
    leases = [claim(stores, worker) for worker in workers]
    reaper.turn()
    assert stores.leases.demand("model/echo", limit=9) == 1
    process.kill()
    process.wait()
    reaper.turn()
    assert stores.leases.demand("model/echo", limit=9) == 2
    assert stores.leases.workers() == [workers[1]]
    assert stores.leases.renew(leases[1]) is None


def test_a_pid_used_again_is_another_process(stores: Stores, reaper: Reaper) -> None:
    """Its start time tells."""
    planned(stores, 1)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = f"here:run-1:{process.pid}:{start_ticks(process.pid) - 1}"
    stores.leases.register(worker)
    claim(stores, worker)
    reaper.turn()
    assert claim(stores).attempts == 1
    process.kill()
    process.wait()


def test_a_name_that_no_process_has_stops_no_turn(stores: Stores, reaper: Reaper) -> None:
    """What holds leases under another kind of name is taken back when they expire."""
    planned(stores, 1)
    for worker in ("w", "here:run-1:pid:0", "here:run-1:12"):
        stores.leases.register(worker)
    claim(stores, "w")
    reaper.turn()
    time.sleep(TTL_S + 0.1)
    reaper.turn()
    assert claim(stores).attempts == 1


def test_missing_tickets_are_published(stores: Stores, reaper: Reaper) -> None:
    """As many as there is work, at most the window, and not again while they wait."""
    planned(stores, 10)
    link_model(stores)
    record(stores, jsonl(numbered(1)))
    stores.redis.delete("vlmq:celery:control", "vlmq:celery:batch.echo")
    for _ in range(3):
        reaper.turn()
        assert stores.tickets.waiting(batch_queue("echo")) == 4
        assert stores.tickets.waiting(CONTROL_QUEUE) == 1


def test_without_work_no_tickets_are_published(stores: Stores, reaper: Reaper) -> None:
    """Chunks in work need none."""
    batch = planned(stores, 1)
    lease = claim(stores)
    stores.redis.delete("vlmq:celery:control", "vlmq:celery:batch.echo")
    stores.batches.stop(batch.id, "cancelled")
    stores.redis.delete("vlmq:celery:control")
    reaper.turn()
    assert stores.tickets.waiting(batch_queue("echo")) == 0
    stores.leases.release(lease)
    reaper.turn()
    assert stores.tickets.waiting(CONTROL_QUEUE) == 1


def test_a_batch_whose_window_ended_expires(stores: Stores, reaper: Reaper) -> None:
    """One whose window goes on does not."""
    late, other = planned(stores, 2), planned(stores, 2)
    stores.redis.zadd("vlmq:deadlines", {late.id: time.time() - 1})
    reaper.turn()
    assert now(stores, late).stop_reason == "expired"
    assert now(stores, late).state == BatchState.FINALIZING
    assert now(stores, other).stop_reason is None


def test_a_batch_that_cannot_be_expired_holds_up_nothing_else(
    stores: Stores, reaper: Reaper
) -> None:
    """Neither the expiry of others, nor tickets, nor the sweep that may make room."""
    broken, late = planned(stores, 1), planned(stores, 1)
    shutil.rmtree(stores.batches.folder(broken.id))
    file = upload(stores, b"x", expires_after_s=60)
    long_ago = time.time() - 10
    stores.redis.zadd("vlmq:deadlines", {broken.id: long_ago, late.id: long_ago + 1})
    stores.redis.zadd("vlmq:file_expiry", {file.id: long_ago})
    stores.redis.delete("vlmq:celery:control")
    reaper._swept_at = float("-inf")
    reaper.turn()
    assert now(stores, late).stop_reason == "expired"
    assert stores.tickets.waiting(CONTROL_QUEUE) > 0
    assert not stores.layout.file_dir(file.id).exists()


def test_the_program_takes_back_what_was_lost(stores: Stores, tmp_path: Path) -> None:
    """As a process of its own, until SIGTERM."""
    batch = planned(stores, 1)
    claim(stores)
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(snapshot(stores.settings)))
    process = subprocess.Popen([sys.executable, "-m", "workers.reaper", "--config", str(config)])
    try:
        wait_for(lambda: stores.leases.demand("model/echo", limit=1) == 1, "the chunk", 20)
    finally:
        process.terminate()
    assert process.wait(timeout=10) == 0
    commit(stores, claim(stores))
    assert now(stores, batch).state == BatchState.FINALIZING


# --- fine-tunes -------------------------------------------------------------------------------


def test_an_expired_fine_tune_is_taken_back(stores: Stores, reaper: Reaper) -> None:
    """One that is renewed is not, and the attempt counts."""
    lost, kept = running(stores), running(stores)
    time.sleep(TTL_S * 0.6)
    stores.finetunes.renew(kept)
    time.sleep(TTL_S * 0.6)
    reaper.turn()
    again = claim_finetune(stores)
    assert (again.job_id, again.attempts) == (lost.job_id, 1)
    assert stores.finetunes.renew(kept) == "run"


def test_after_a_restart_of_redis_trainers_have_time_to_renew(stores: Stores) -> None:
    """A training of hours must not be taken away for that."""
    lease = running(stores)
    time.sleep(TTL_S + 0.1)
    reaper = Reaper(stores.settings, stores)
    reaper.turn()
    assert stores.finetunes.renew(lease) == "run"
    time.sleep(TTL_S + 0.1)
    reaper.turn()
    assert claim_finetune(stores).attempts == 1


def test_what_a_dead_consumer_of_this_run_trained_is_taken_back_at_once(
    stores: Stores, reaper: Reaper
) -> None:
    """Not what another node's did."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = f"{process.pid}:{start_ticks(process.pid)}"
    here, there = f"here:run-1:{name}", f"there:run-1:{name}"
    for worker in (here, there):
        stores.leases.register(worker)
    mine, other = running(stores, worker=here), running(stores, worker=there)
    reaper.turn()
    assert stores.finetunes.demand(limit=9) == 0
    process.kill()
    process.wait()
    reaper.turn()
    assert claim_finetune(stores).job_id == mine.job_id
    assert stores.finetunes.renew(other) == "run"


def test_missing_tickets_of_fine_tunes_are_published(stores: Stores, reaper: Reaper) -> None:
    """As many as could be claimed, at most the window, and not again while they wait."""
    for _ in range(2):
        create_finetune(stores)
    claim_finetune(stores, "validate")
    stores.redis.delete("vlmq:celery:finetune")
    for _ in range(2):
        reaper.turn()
        assert stores.tickets.waiting(FINETUNE_QUEUE) == 1
    for _ in range(9):
        create_finetune(stores)
    stores.redis.delete("vlmq:celery:finetune")
    reaper.turn()
    assert stores.tickets.waiting(FINETUNE_QUEUE) == 4


def test_an_event_that_cannot_be_written_holds_up_no_reaping(
    stores: Stores, reaper: Reaper
) -> None:
    """The job is free all the same, and so is the next one."""
    broken, other = running(stores), running(stores)
    shutil.rmtree(stores.finetunes.path(broken.job_id) / "events")
    time.sleep(TTL_S * 1.2)
    reaper.turn()
    for lease in (broken, other):
        assert stores.finetunes.get("ann", lease.job_id).state == FinetuneState.QUEUED
