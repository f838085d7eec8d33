"""Redis lost, then put back from what shared storage holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shared.errors import FileInUse, LeaseLost
from shared.jobs import Batch, BatchProblem, BatchState
from shared.leases import CONTROL_LANE
from shared.rebuild import missing_batches
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import numbered
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
    write,
)

LEAP = 1 << 20


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that cut a chunk for each line."""
    settings = store_settings(redis_url, tmp_path, queue={"chunk_items": 1})
    with connected(settings) as found:
        yield found


def lose_redis(stores: Stores) -> None:
    """Everything in it is gone."""
    stores.redis.flushall()


def finish(stores: Stores) -> None:
    """Work off what is left."""
    while (lease := stores.leases.claim("model/echo", "w")) is not None:
        commit(stores, lease)
    run_control(stores)


def but_for_times(batch: Batch) -> Batch:
    """The batch without the moments that only Redis knew."""
    return msgspec.structs.replace(
        batch,
        in_progress_at=None,
        finalizing_at=None,
        started_ms=None,
        committed_ms=None,
        from_ms=None,
    )


def test_files_come_back_as_they_were(stores: Stores) -> None:
    """With their owners, ages and expiries; an upload that was never whole does not."""
    files = [
        upload(stores, b"x", owner="ann"),
        upload(stores, b"y", owner="bob", expires_after_s=99),
    ]
    half = stores.layout.files / "file-half"
    half.mkdir()
    (half / "content").write_bytes(b"half")
    before = sorted(stores.redis.keys("vlmq:*"))
    lose_redis(stores)
    assert stores.rebuild().files == 2
    assert [stores.files.get(file.owner, file.id) for file in files] == files
    assert sorted(stores.redis.keys("vlmq:*")) == before
    assert stores.files.list("ann").items == files[:1]


@pytest.mark.parametrize("how", ["completed", "cancelled", "failed"])
def test_what_has_ended_stays_ended(stores: Stores, how: str) -> None:
    """With every count, date and problem, and nothing to work on."""
    link_model(stores)
    if how == "failed":
        batch = record(stores, b"")
        run_control(stores)
    else:
        batch = planned(stores, 3)
        problems = [BatchProblem("invalid_json", "broken", None, 1)]
        commit(stores, claim(stores), completed=0, failed=1, problems=problems)
        if how == "cancelled":
            stores.batches.cancel("ann", batch.id)
            run_control(stores)
        else:
            finish(stores)
    before = now(stores, batch)
    assert before.state == how
    never_ran = {"failed:batch_cancelled": 2} if how == "cancelled" else {}
    assert before.counts == ({} if how == "failed" else {"failed:made_up": 1, **never_ran})
    lose_redis(stores)
    assert stores.rebuild().batches == 1
    assert now(stores, batch) == before
    assert stores.leases.lanes() == []
    ended_at = getattr(before, f"{how}_at")
    assert stores.redis.zscore("vlmq:ended", batch.id) == ended_at
    stores.files.delete("ann", batch.input_file_id)


def test_committed_chunks_are_kept_and_the_rest_is_offered_again(stores: Stores) -> None:
    """The counters are those of the shards; what was in work is claimed anew."""
    batch = planned(stores, 5)
    problems = [BatchProblem("invalid_json", "broken", None, 3)]
    leases = [claim(stores) for _ in range(4)]
    commit(stores, leases[0])
    commit(stores, leases[2], completed=0, failed=1, problems=problems)
    before = now(stores, batch)
    lose_redis(stores)
    assert stores.rebuild().chunks_kept == 2
    assert but_for_times(now(stores, batch)) == but_for_times(before)
    claimed = [claim(stores) for _ in range(3)]
    assert sorted(lease.unit for lease in claimed) == ["1", "3", "4"]
    assert stores.leases.claim("model/echo", "w") is None
    for lease in claimed:
        commit(stores, lease)
    run_control(stores)
    ended = now(stores, batch)
    assert ended.state == BatchState.COMPLETED
    assert output_of(stores, ended) == b"out 0\nout 1\nout 3\nout 4\n"
    assert output_of(stores, ended, "errors") == b"err 2\n"


def test_a_worker_from_before_gets_nowhere(stores: Stores) -> None:
    """New tokens start far above all old ones."""
    batch = planned(stores, 2)
    old = claim(stores)
    commit(stores, claim(stores))
    lose_redis(stores)
    stores.rebuild()
    new = claim(stores)
    assert new.unit == old.unit
    assert new.token > old.token + LEAP // 2
    with pytest.raises(LeaseLost):
        commit(stores, old)
    with pytest.raises(LeaseLost):
        stores.leases.renew(old)
    commit(stores, new)
    assert now(stores, batch).state == BatchState.FINALIZING


def test_a_late_shard_of_an_old_token_is_not_the_result(stores: Stores) -> None:
    """It lies beside the committed one; the higher token counts, then and after another loss."""
    batch = planned(stores, 1)
    old = claim(stores)
    lose_redis(stores)
    stores.rebuild()
    commit(stores, claim(stores))
    write(stores, old, text="late")
    lose_redis(stores)
    stores.rebuild()
    run_control(stores)
    assert output_of(stores, now(stores, batch)) == b"out 0\n"


def test_a_shard_that_was_written_but_not_committed_counts(stores: Stores) -> None:
    """It is whole, so its items are not computed again."""
    batch = planned(stores, 2)
    write(stores, claim(stores))
    lose_redis(stores)
    stores.rebuild()
    assert now(stores, batch).completed == 1
    finish(stores)
    assert output_of(stores, now(stores, batch)) == b"out 0\nout 1\n"


def test_a_damaged_shard_is_computed_again(stores: Stores) -> None:
    """One bad file must not keep everything else from coming back."""
    batch = planned(stores, 2)
    lease = claim(stores)
    commit(stores, lease)
    [path] = (stores.batches.folder(batch.id) / "shards").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    lose_redis(stores)
    report = stores.rebuild()
    assert (len(report.damaged), report.chunks_kept) == (1, 0)
    finish(stores)
    assert output_of(stores, now(stores, batch)) == b"out 0\nout 1\n"


@pytest.mark.parametrize("is_planned", [False, True])
def test_a_request_to_cancel_is_not_forgotten(stores: Stores, is_planned: bool) -> None:
    """Before or after the batch was planned."""
    link_model(stores)
    batch = planned(stores, 3) if is_planned else record(stores, jsonl(numbered(3)))
    held = claim(stores) if is_planned else stores.leases.claim(CONTROL_LANE, "w")
    assert held is not None
    stores.batches.cancel("ann", batch.id)
    lose_redis(stores)
    stores.rebuild()
    assert stores.leases.claim("model/echo", "w") is None
    run_control(stores)
    ended = now(stores, batch)
    assert ended.state == BatchState.CANCELLED
    assert ended.failed == (3 if is_planned else 0)


def test_a_batch_that_waited_to_be_planned_waits_again(stores: Stores) -> None:
    """Its creation was acknowledged."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(2)))
    lose_redis(stores)
    stores.rebuild()
    assert now(stores, batch) == batch
    with pytest.raises(FileInUse):
        stores.files.delete("ann", batch.input_file_id)
    run_control(stores)
    finish(stores)
    assert now(stores, batch).state == BatchState.COMPLETED


def test_a_batch_with_all_chunks_done_is_finalized(stores: Stores) -> None:
    """The loss came between the last commit and the end."""
    batch = planned(stores, 2)
    for _ in range(2):
        commit(stores, claim(stores))
    lose_redis(stores)
    stores.rebuild()
    assert now(stores, batch).state == BatchState.FINALIZING
    run_control(stores)
    assert output_of(stores, now(stores, batch)) == b"out 0\nout 1\n"


def test_doing_it_twice_or_with_nothing_lost_changes_nothing(stores: Stores) -> None:
    """It may be run at any time, also while work goes on."""
    batch = planned(stores, 3)
    commit(stores, claim(stores))
    held = claim(stores)

    def everything() -> dict[bytes, bytes]:
        names = stores.redis.keys("vlmq:*")
        return {name: stores.redis.dump(name) for name in names if b"server" not in name}

    before = everything()
    stores.rebuild()
    assert everything() == before
    assert stores.leases.renew(held) is None
    lose_redis(stores)
    stores.rebuild()
    restored = everything()
    stores.rebuild()
    assert everything() == restored
    assert now(stores, batch).completed == 1


def test_a_live_batchs_input_is_protected_before_it_is_listed(stores: Stores) -> None:
    """A sweep in the middle must not find an old file that seems unused."""
    batch = planned(stores, 2)
    lose_redis(stores)
    seen: list[int] = []
    index = stores.files.index

    def watched(file: object) -> None:
        seen.append(stores.redis.scard(f"vlmq:users:{batch.input_file_id}"))
        index(file)  # type: ignore[arg-type]

    stores.files.index = watched  # type: ignore[method-assign]
    stores.rebuild()
    assert seen == [1]


def test_a_redis_that_lost_its_batches_is_noticed(stores: Stores) -> None:
    """By counting what is on shared storage and not in it."""
    link_model(stores)
    batches = [record(stores, jsonl(numbered(1))) for _ in range(3)]
    assert missing_batches(stores.redis, stores.layout) == 0
    stores.redis.delete(f"vlmq:batch:{batches[1].id}")
    assert missing_batches(stores.redis, stores.layout) == 1
    lose_redis(stores)
    assert missing_batches(stores.redis, stores.layout) == 3
    stores.rebuild()
    assert missing_batches(stores.redis, stores.layout) == 0
