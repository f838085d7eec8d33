"""What is deleted after its time, and what never is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.clock import unix_now
from shared.errors import NotFound
from shared.jobs import BatchState
from shared.retention import clear_leftovers, sweep
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.stored_batches import claim, commit, now, planned, run_control, upload

DAY_S = 86_400


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that keep files for two days and batches for three."""
    storage = {"keep_files_days": 2, "keep_batches_days": 3}
    with connected(store_settings(redis_url, tmp_path, storage=storage)) as found:
        yield found


def age(stores: Stores, index: str, member: str, days: float) -> None:
    """Make an index think that something happened that long ago."""
    stores.redis.zadd(f"vlmq:{index}", {member: unix_now() - days * DAY_S})


def test_an_expired_file_is_removed(stores: Stores) -> None:
    """And one whose time has not come is not."""
    gone = upload(stores, b"x", expires_after_s=3600)
    kept = upload(stores, b"x", expires_after_s=3600)
    age(stores, "file_expiry", gone.id, 0.1)
    assert sweep(stores) == 1
    with pytest.raises(NotFound):
        stores.files.get("ann", gone.id)
    assert not stores.layout.file_dir(gone.id).exists()
    assert stores.files.get("ann", kept.id) == kept
    assert sweep(stores) == 0


def test_old_uploads_are_removed(stores: Stores) -> None:
    """After the days that the settings say."""
    old, fresh = upload(stores, b"x"), upload(stores, b"x")
    age(stores, "uploads", old.id, 2.1)
    age(stores, "uploads", fresh.id, 1.9)
    assert sweep(stores) == 1
    assert [file.id for file in stores.files.list("ann").items] == [fresh.id]


def test_the_input_of_a_live_batch_is_kept(stores: Stores) -> None:
    """However old it is and whenever it expired; when the batch has ended it goes."""
    batch = planned(stores, 1)
    age(stores, "uploads", batch.input_file_id, 99)
    age(stores, "file_expiry", batch.input_file_id, 99)
    assert sweep(stores) == 0
    commit(stores, claim(stores))
    assert sweep(stores) == 0
    run_control(stores)
    assert sweep(stores) == 1
    assert now(stores, batch).state == BatchState.COMPLETED


def test_an_old_batch_goes_with_its_results(stores: Stores) -> None:
    """Its record, its folder, its output; a younger one stays."""
    batches = [planned(stores, 1) for _ in range(2)]
    for _ in batches:
        commit(stores, claim(stores))
    run_control(stores, times=2)
    old, young = (now(stores, batch) for batch in batches)
    assert old.output_file_id is not None
    age(stores, "ended", old.id, 3.1)
    assert sweep(stores) == 1
    with pytest.raises(NotFound):
        now(stores, old)
    with pytest.raises(NotFound):
        stores.files.get("ann", old.output_file_id)
    assert not stores.batches.folder(old.id).exists()
    assert not stores.layout.file_dir(old.output_file_id).exists()
    assert stores.redis.keys(f"vlmq:*{old.id}*") == []
    assert now(stores, young) == young
    assert stores.batches.list("ann").items == [young]


def test_a_result_that_its_owner_deleted_already_does_not_matter(stores: Stores) -> None:
    """The batch goes all the same."""
    batch = planned(stores, 1)
    commit(stores, claim(stores))
    run_control(stores)
    ended = now(stores, batch)
    assert ended.output_file_id is not None
    stores.files.delete("ann", ended.output_file_id)
    age(stores, "ended", batch.id, 4)
    assert sweep(stores) == 1
    with pytest.raises(NotFound):
        now(stores, batch)


def test_results_are_not_uploads(stores: Stores) -> None:
    """``keep_files_days`` leaves a batch's output alone."""
    batch = planned(stores, 1)
    commit(stores, claim(stores))
    run_control(stores)
    stores.files.delete("ann", batch.input_file_id)
    assert stores.redis.zcard("vlmq:uploads") == 0


def test_a_running_batch_is_never_too_old(stores: Stores) -> None:
    """Only what has ended is."""
    batch = planned(stores, 1)
    assert sweep(stores) == 0
    assert stores.redis.zcard("vlmq:ended") == 0
    assert now(stores, batch) == batch


def test_without_settings_everything_is_kept(redis_url: str, tmp_path: Path) -> None:
    """Nothing is deleted that nobody asked to delete."""
    with connected(store_settings(redis_url, tmp_path)) as stores:
        file = upload(stores, b"x")
        age(stores, "uploads", file.id, 9999)
        assert sweep(stores) == 0
        assert stores.files.get("ann", file.id) == file
        assert [path.name for path in stores.layout.files.iterdir()] == [file.id]


def test_what_killed_programs_left_is_cleared_after_a_day(stores: Stores) -> None:
    """Half an upload and a half-deleted folder; never a whole file, a batch, or what is young."""
    whole, batch = upload(stores, b"x"), planned(stores, 1)
    files = stores.layout.files
    names = ("file-half", ".file-gone.12ab34cd.part", "file-young")
    for name in names:
        (files / name).mkdir()
        (files / name / "content").write_bytes(b"half")
    long_ago = unix_now() - 1.1 * DAY_S
    for path in [*files.rglob("*"), *stores.layout.batches.rglob("*")]:
        os.utime(path, (long_ago, long_ago))
    os.utime(files / "file-young" / "content")
    assert clear_leftovers(stores) == 2
    assert sorted(path.name for path in files.iterdir()) == sorted(
        [whole.id, batch.input_file_id, "file-young"]
    )
    assert now(stores, batch) == batch
    assert clear_leftovers(stores) == 0
