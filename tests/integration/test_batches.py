"""A batch's records from its creation to its end, step by step, on real stores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.batches import window_s
from shared.errors import IllegalTransition, InvalidValue, LeaseLost, NotFound, QueueUnavailable
from shared.jobs import Batch, BatchProblem, BatchState
from shared.leases import CONTROL_LANE
from shared.queue import CONTROL_QUEUE
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import line, numbered
from tests.stored_batches import (
    claim,
    commit,
    jsonl,
    link_model,
    now,
    output_of,
    planned,
    record,
    run_control,
    upload,
)
from workers.inference.control import run_control_unit
from workers.keeper import Keeper

ONE_EACH = {"queue": {"chunk_items": 1}}


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that cut a chunk for each line."""
    with connected(store_settings(redis_url, tmp_path, **ONE_EACH)) as found:
        yield found


def rows(content: bytes) -> list[dict[str, Any]]:
    """The lines of a result file."""
    return [json.loads(row) for row in content.splitlines()]


# --- the way to the end -----------------------------------------------------------------------


def test_a_batch_goes_from_its_record_to_its_result(stores: Stores) -> None:
    """Every state is passed and dated, the shards are joined in the chunks' order, then gone."""
    batch = planned(stores, 3)
    leases = [claim(stores) for _ in range(3)]
    for lease in reversed(leases):
        is_bad = lease.unit == "1"
        commit(stores, lease, completed=int(not is_bad), failed=int(is_bad))
    assert now(stores, batch).state == BatchState.FINALIZING
    run_control(stores)
    ended = now(stores, batch)
    assert ended.state == BatchState.COMPLETED
    assert output_of(stores, ended) == b"out 0\nout 2\n"
    assert output_of(stores, ended, "errors") == b"err 1\n"
    times = [ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at]
    assert None not in times
    assert times == sorted(time for time in times if time is not None)
    assert (ended.prompt_tokens, ended.completion_tokens) == (4, 2)
    assert not (stores.batches.folder(batch.id) / "shards").exists()
    assert stores.leases.lanes() == []
    events = [
        json.loads(event)["to"]
        for event in stores.redis.lrange(f"vlmq:batch:{batch.id}:events", 0, -1)
    ]
    assert events == ["in_progress", "finalizing", "completed"]


def test_lines_that_are_not_accounted_for_stop_the_end(stores: Stores) -> None:
    """A batch never completes with fewer lines than it has; it is tried again."""
    batch = planned(stores, 2)
    commit(stores, claim(stores), completed=0)
    commit(stores, claim(stores))
    lease = stores.leases.claim(CONTROL_LANE, "w")
    assert lease is not None
    with pytest.raises(Exception, match="1 of 2 lines"):
        run_control_unit(lease, stores, Keeper(stores.leases, renew_s=5))
    assert now(stores, batch).state == BatchState.FINALIZING


def test_an_empty_error_file_is_not_kept(stores: Stores) -> None:
    """Its id is null and nothing of it is listed or left."""
    batch = planned(stores, 1)
    commit(stores, claim(stores))
    run_control(stores)
    ended = now(stores, batch)
    assert ended.error_file_id is None
    listed = {record.id for record in stores.files.list("ann").items}
    assert listed == {batch.input_file_id, ended.output_file_id}
    assert {folder.name for folder in stores.layout.files.iterdir()} == listed


def test_results_expire_when_the_batch_says_so(stores: Stores) -> None:
    """The time counts from their own creation."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(1)), output_expires_after_s=3600)
    run_control(stores)
    commit(stores, claim(stores))
    run_control(stores)
    ended = now(stores, batch)
    assert ended.output_file_id is not None
    output = stores.files.get("ann", ended.output_file_id)
    assert output.expires_at == output.created_at + 3600


def test_a_warning_stays_until_work_succeeds(stores: Stores) -> None:
    """A passing trouble is shown with the batch, and then not any more."""
    batch = planned(stores, 2)
    stores.leases.release(claim(stores), warning="storage_full")
    assert now(stores, batch).warning == "storage_full"
    commit(stores, claim(stores))
    assert now(stores, batch).warning is None


def test_problems_are_kept_up_to_a_hundred(stores: Stores) -> None:
    """However many lines are wrong, the batch's record stays small."""
    batch = planned(stores, 2)
    many = [BatchProblem("invalid_json", "broken", None, number) for number in range(80)]
    commit(stores, claim(stores), problems=many)
    commit(stores, claim(stores), problems=many)
    assert now(stores, batch).problems == (many * 2)[:100]


# --- stopping ---------------------------------------------------------------------------------


def half_done(stores: Stores, reason: str) -> Batch:
    """A batch of four lines, stopped with one of them done and one in work."""
    batch = planned(stores, 4)
    commit(stores, claim(stores))
    held = claim(stores)
    if reason == "expired":
        stores.redis.zadd("vlmq:deadlines", {batch.id: 1})
        assert stores.batches.overdue() == [batch.id]
    stores.batches.stop(batch.id, reason)  # type: ignore[arg-type]
    assert stores.batches.overdue() == []
    stores.leases.release(held)
    run_control(stores)
    return now(stores, batch)


@pytest.mark.parametrize("reason", ["cancelled", "expired"])
def test_a_stopped_batch_keeps_what_is_done(stores: Stores, reason: str) -> None:
    """Each line is in one file or the other; those that never ran say why in ``error``."""
    ended = half_done(stores, reason)
    assert ended.state == reason
    assert output_of(stores, ended) == b"out 0\n"
    missing = rows(output_of(stores, ended, "errors"))
    assert [row["custom_id"] for row in missing] == ["item-1", "item-2", "item-3"]
    assert {row["error"]["code"] for row in missing} == {f"batch_{reason}"}
    assert {row["response"] for row in missing} == {None}
    assert (ended.total, ended.completed, ended.failed) == (4, 1, 3)
    assert getattr(ended, f"{reason}_at") is not None


def test_cancelling_one_batch_leaves_its_twin_alone(stores: Stores) -> None:
    """Two batches of the same lines: the other's result is whole."""
    twin = planned(stores, 4)
    stopped = planned(stores, 4)
    for _ in range(2):
        commit(stores, claim(stores))
    stores.batches.cancel("ann", stopped.id)
    run_control(stores)
    while (lease := stores.leases.claim("model/echo", "w")) is not None:
        assert lease.batch_id == twin.id
        commit(stores, lease)
    run_control(stores)
    whole, part = now(stores, twin), now(stores, stopped)
    assert (whole.state, part.state) == (BatchState.COMPLETED, BatchState.CANCELLED)
    assert output_of(stores, whole) == b"out 0\nout 1\nout 2\nout 3\n"
    assert output_of(stores, part) == b"out 0\n"
    assert len(rows(output_of(stores, part, "errors"))) == 3


def test_what_has_ended_cannot_be_cancelled(stores: Stores) -> None:
    """An end is final."""
    ended = half_done(stores, "cancelled")
    with pytest.raises(IllegalTransition):
        stores.batches.cancel("ann", ended.id)
    assert now(stores, ended) == ended


# --- finalizers that are overtaken ------------------------------------------------------------


def test_a_finalizer_that_was_overtaken_leaves_the_result_alone(stores: Stores) -> None:
    """It wakes after another finished, finds no shards and must not write an empty result."""
    batch = planned(stores, 2)
    for _ in range(2):
        commit(stores, claim(stores))
    late = stores.leases.claim(CONTROL_LANE, "paused")
    assert late is not None
    stores.leases.reap(["paused"])
    run_control(stores)
    ended = now(stores, batch)
    with pytest.raises(LeaseLost):
        run_control_unit(late, stores, Keeper(stores.leases, renew_s=5))
    assert now(stores, batch) == ended
    assert output_of(stores, ended) == b"out 0\nout 1\n"
    assert len(stores.files.list("ann").items) == 2


def test_a_finalizer_overtaken_by_one_at_work_writes_the_same(stores: Stores) -> None:
    """Both may finish; one is refused and the bytes are the same."""
    batch = planned(stores, 2)
    for _ in range(2):
        commit(stores, claim(stores))
    late = stores.leases.claim(CONTROL_LANE, "paused")
    assert late is not None
    stores.leases.reap(["paused"])
    assert stores.leases.claim(CONTROL_LANE, "quick") is not None
    with pytest.raises(LeaseLost):
        run_control_unit(late, stores, Keeper(stores.leases, renew_s=5))
    stores.leases.reap(["quick"])
    run_control(stores)
    assert output_of(stores, now(stores, batch)) == b"out 0\nout 1\n"


# --- input that cannot be run -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "param", "at"),
    [
        (b"", "empty_file", None, None),
        (b"\n \n\r\n", "empty_file", None, None),
        (b"\nnot json\n", "invalid_json", None, 2),
        (
            b"{broken\n" + line("a", "x", model="nobody").encode() + b"\n",
            "model_not_found",
            "model",
            2,
        ),
    ],
)
def test_a_file_without_anything_to_run_fails_the_batch(
    stores: Stores, content: bytes, code: str, param: str | None, at: int | None
) -> None:
    """With one problem that says what and where."""
    link_model(stores)
    batch = record(stores, content)
    run_control(stores)
    failed = now(stores, batch)
    assert failed.state == BatchState.FAILED
    assert failed.failed_at is not None
    [problem] = failed.problems
    assert (problem.code, problem.param, problem.line) == (code, param, at)
    assert problem.message
    stores.files.delete("ann", batch.input_file_id)


def test_an_input_file_that_vanished_fails_the_batch(stores: Stores) -> None:
    """However that came about, the batch does not wait for ever."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(1)))
    (stores.layout.file_dir(batch.input_file_id) / "content").unlink()
    run_control(stores)
    assert [problem.code for problem in now(stores, batch).problems] == ["not_found"]


def test_a_batch_that_is_not_on_disk_does_not_exist(stores: Stores) -> None:
    """Redis heard of it, its creator was told that it failed: it is not run."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(1)))
    (stores.batches.folder(batch.id) / "batch.json").unlink()
    run_control(stores)
    assert now(stores, batch).state == BatchState.FAILED


# --- reading ----------------------------------------------------------------------------------


def test_another_owners_batch_is_not_there(stores: Stores) -> None:
    """Neither read, nor listed, nor cancelled."""
    batch = planned(stores, 1, owner="ann")
    for step in (stores.batches.get, stores.batches.cancel):
        with pytest.raises(NotFound):
            step("bob", batch.id)
    assert stores.batches.list("bob").items == []
    with pytest.raises(InvalidValue):
        stores.batches.list("bob", after=batch.id)


@pytest.mark.parametrize(
    "batch_id", ["", "batch_", "batch_../x", "file-1", "batch_\x00", "x" * 999]
)
def test_odd_ids_are_not_found(stores: Stores, batch_id: str) -> None:
    """Nothing of an id reaches a path unchecked."""
    with pytest.raises(NotFound):
        stores.batches.get("ann", batch_id)


def test_lists_are_newest_first_and_paged(stores: Stores) -> None:
    """By the id of the last one seen."""
    link_model(stores)
    content = jsonl(numbered(1))
    ids = [record(stores, content).id for _ in range(5)]
    stores.redis.zadd("vlmq:batches:ann", {name: at for at, name in enumerate(ids)})
    first = stores.batches.list("ann", limit=2)
    rest = stores.batches.list("ann", after=ids[3], limit=3)
    assert [batch.id for batch in first.items] == [ids[4], ids[3]]
    assert [batch.id for batch in rest.items] == [ids[2], ids[1], ids[0]]
    assert (first.has_more, rest.has_more) == (True, False)


def test_a_live_batchs_input_cannot_be_deleted(stores: Stores) -> None:
    """It can once the batch has ended."""
    from shared.errors import FileInUse

    batch = planned(stores, 1)
    with pytest.raises(FileInUse):
        stores.files.delete("ann", batch.input_file_id)
    commit(stores, claim(stores))
    with pytest.raises(FileInUse):
        stores.files.delete("ann", batch.input_file_id)
    run_control(stores)
    stores.files.delete("ann", batch.input_file_id)


def test_creating_announces_itself(stores: Stores) -> None:
    """A ticket waits for whoever plans."""
    link_model(stores)
    record(stores, jsonl(numbered(1)))
    assert stores.tickets.waiting(CONTROL_QUEUE) == 1


def test_without_redis_nothing_is_left_of_a_batch(stores: Stores, tmp_path: Path) -> None:
    """The caller is told to try again and nothing runs behind its back."""
    file = upload(stores, jsonl(numbered(1)))
    away = store_settings(f"unix://{tmp_path}/nobody.sock", tmp_path)
    with connected(away) as cut_off, pytest.raises(QueueUnavailable):
        cut_off.batches.create(
            owner="ann",
            input_file=file,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata=None,
        )
    assert list(stores.layout.batches.iterdir()) == []


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("1m", 60), ("7d", 604800)])
def test_windows_are_minutes_hours_or_days(text: str, seconds: int) -> None:
    """As OpenAI writes 24h."""
    assert window_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "h", "0h", "-1h", "1.5h", "24", "24s", "²h", "9999999d", "1 h"]
)
def test_other_windows_are_refused(text: str) -> None:
    """By name."""
    with pytest.raises(InvalidValue) as refused:
        window_s(text)
    assert refused.value.param == "completion_window"
