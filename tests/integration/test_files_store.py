"""The store of files on a real Valkey and a real disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from shared.errors import BodyTooLarge, InvalidValue, NotFound, QueueUnavailable, StorageFull
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.stored_batches import upload


def folders(stores: Stores) -> list[str]:
    """What is on disk, hidden names included."""
    return sorted(path.name for path in stores.layout.files.iterdir())


def test_a_file_comes_back_as_it_went_in(own_stores: Stores) -> None:
    """Its record says its size and digest."""
    content = bytes(range(256)) * 1000
    with own_stores.files.begin(owner="ann", filename="ä.bin", purpose="vision") as writer:
        for start in range(0, len(content), 7777):
            writer.write(content[start : start + 7777])
        file = writer.commit()
    assert own_stores.files.get("ann", file.id) == file
    assert own_stores.files.content_path("ann", file.id).read_bytes() == content
    assert (file.bytes, file.filename) == (len(content), "ä.bin")
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.expires_at is None


def test_only_this_user_may_open_it(own_stores: Stores) -> None:
    """Files hold people's images."""
    file = upload(own_stores, b"x")
    folder = own_stores.layout.file_dir(file.id)
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


def test_a_write_that_is_not_committed_leaves_nothing(own_stores: Stores) -> None:
    """Whether it was given up or failed."""
    with own_stores.files.begin(owner="ann", filename="a", purpose="batch") as writer:
        writer.write(b"half")

    def fail() -> None:
        with own_stores.files.begin(owner="ann", filename="a", purpose="batch") as writer:
            writer.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folders(own_stores) == []
    assert own_stores.files.list("ann").items == []


def test_a_file_over_the_limit_is_refused(redis_url: str, tmp_path: Path) -> None:
    """At the first byte too many, and nothing stays."""
    settings = store_settings(redis_url, tmp_path, api={"max_upload_bytes": 10})
    with connected(settings) as stores:
        upload(stores, b"0123456789")
        with pytest.raises(BodyTooLarge) as refused:
            upload(stores, b"0123456789a")
        assert refused.value.param == "file"
        assert len(folders(stores)) == 1


def test_without_redis_an_upload_leaves_nothing(own_stores: Stores, tmp_path: Path) -> None:
    """It was not acknowledged, so it must not take space."""
    away = store_settings(f"unix://{tmp_path}/nobody.sock", tmp_path)
    with connected(away) as cut_off, pytest.raises(QueueUnavailable):
        upload(cut_off, b"content")
    assert folders(own_stores) == []


def test_uploads_are_refused_while_room_is_kept_free(redis_url: str, tmp_path: Path) -> None:
    """Before the first byte is taken."""
    settings = store_settings(redis_url, tmp_path, storage={"min_free_bytes": 1 << 60})
    with connected(settings) as stores, pytest.raises(StorageFull, match="MiB free"):
        stores.files.begin(owner="ann", filename="a", purpose="batch")


def test_another_owners_file_is_not_there(own_stores: Stores) -> None:
    """Neither read, nor deleted, nor listed."""
    file = upload(own_stores, b"x", owner="ann")
    for step in (own_stores.files.get, own_stores.files.content_path, own_stores.files.delete):
        with pytest.raises(NotFound):
            step("bob", file.id)
    assert own_stores.files.list("bob").items == []
    assert own_stores.files.get("ann", file.id) == file


@pytest.mark.parametrize(
    "file_id", ["", "file-", "file-../../keys", "batch_1", "file-a/b", "file-%2e"]
)
def test_odd_ids_are_not_found(own_stores: Stores, file_id: str) -> None:
    """Nothing of an id reaches a path unchecked."""
    with pytest.raises(NotFound):
        own_stores.files.content_path("ann", file_id)


def test_lists_are_paged_filtered_and_ordered(own_stores: Stores) -> None:
    """A page holds ``limit`` of the purpose asked for, however many others lie between."""
    files = [
        upload(own_stores, b"x", purpose="vision" if number % 3 else "batch")
        for number in range(10)
    ]
    own_stores.redis.zadd("vlmq:files:ann", {file.id: at for at, file in enumerate(files)})
    wanted = [file.id for file in files if file.purpose == "batch"]
    seen: list[str] = []
    after = None
    pages = 0
    while True:
        page = own_stores.files.list(
            "ann", after=after, limit=2, newest_first=False, purpose="batch"
        )
        seen += [file.id for file in page.items]
        pages += 1
        if not page.has_more:
            break
        after = page.items[-1].id
    assert seen == wanted
    assert pages == 2
    newest = own_stores.files.list("ann", limit=3)
    assert [file.id for file in newest.items] == [file.id for file in files[:-4:-1]]
    with pytest.raises(InvalidValue):
        own_stores.files.list("ann", after="file-nothing")


def test_a_deleted_file_is_gone_from_disk_and_lists(own_stores: Stores) -> None:
    """And a second delete finds nothing."""
    file = upload(own_stores, b"x", expires_after_s=3600)
    own_stores.files.delete("ann", file.id)
    assert folders(own_stores) == []
    assert own_stores.files.list("ann").items == []
    assert own_stores.redis.keys("vlmq:*file*") == []
    with pytest.raises(NotFound):
        own_stores.files.delete("ann", file.id)
