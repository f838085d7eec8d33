"""Listing an image set step by step on real stores: killed, paused, overtaken, rebuilt, cancelled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from shared.captions import CaptionSource, Entry, ImagePlace, Place, decode_entry
from shared.errors import FileInUse, LeaseLost
from shared.jobs import Batch, BatchState
from shared.leases import CONTROL_LANE, FINAL, PLAN, Lease, model_lane
from shared.listing import ListingWriter
from shared.manifest import Manifest
from shared.settings import snapshot
from shared.storage import write_json
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import ENDPOINT
from tests.image_sets import write
from tests.running_node import wait_for
from tests.stored_batches import MODEL, link_model, now, upload
from workers.inference import listing as listing_module
from workers.inference.control import run_control_unit
from workers.inference.listing import ListingPaused
from workers.keeper import Keeper

LANES = (CONTROL_LANE, model_lane(MODEL))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that images may be read from."""
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def stores(redis_url: str, tmp_path: Path, root: Path) -> Iterator[Stores]:
    """Stores on an empty Valkey, with ``echo`` linked."""
    settings = store_settings(
        redis_url,
        tmp_path,
        images={"roots": [str(root)]},
        queue={"renew_s": 1, "slice_s": 600, "min_chunk_items": 2, "chunk_items": 16},
    )
    with connected(settings) as found:
        link_model(found)
        yield found


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings publish after every entry."""
    monkeypatch.setattr(listing_module, "FIRST_PUBLISH_S", 0.0)
    monkeypatch.setattr(listing_module, "PUBLISH_S", 0.0)


def record(stores: Stores, path: Path, prompt: str = "say it") -> Batch:
    """A caption job over a path."""
    asked = CaptionSource(images=[ImagePlace(path=str(path))], model=MODEL, prompt=prompt)
    return stores.batches.create(
        owner="ann", source=asked, endpoint=ENDPOINT, completion_window="24h", metadata=None
    )


def claim_listing(stores: Stores, worker: str = "w") -> Lease:
    """Claim the listing, in whichever lane it waits."""
    for lane in LANES:
        lease = stores.leases.claim(lane, worker)
        if lease is not None:
            assert lease.unit == PLAN
            return lease
    raise AssertionError("no listing waits")


def go_on(stores: Stores, lease: Lease, *, pausing: bool = False) -> None:
    """List, until the end or until something was published."""
    run_control_unit(lease, stores, Keeper(stores.leases, renew_s=5), lambda: pausing)


def listed_names(stores: Stores, batch: Batch) -> list[str]:
    """The names of the manifest's entries; chunks and lines must be without gaps."""
    manifest = Manifest(stores.batches.folder(batch.id))
    names: list[str] = []
    for index, chunk in enumerate(manifest.chunks()):
        assert (chunk.index, chunk.first_line) == (index, len(names) + 1)
        with open(manifest.entries(index), "rb") as stream:
            stream.seek(chunk.offset)
            lines = stream.read(chunk.length).splitlines()
        assert len(lines) == chunk.items
        names += [decode_entry(line).name for line in lines]
    assert (manifest.plan.chunks, manifest.plan.total) == (index + 1, len(names))
    return names


def numbered(root: Path, count: int) -> Path:
    """A list of so many images, which need not be there."""
    return write(root / "list.txt", "".join(f"{number}.jpg\n" for number in range(count)))


def test_chunks_are_claimable_before_the_listing_ends(
    stores: Stores, root: Path, hasty: None
) -> None:
    """It is in progress and counts up; no settling before the last image is known."""
    batch = record(stores, numbered(root, 30))
    lease = claim_listing(stores)
    with pytest.raises(ListingPaused):
        go_on(stores, lease, pausing=True)
    found = now(stores, batch)
    assert (found.state, found.model, found.total) == (BatchState.IN_PROGRESS, MODEL, 1)
    assert found.listing
    stores.leases.release(lease)
    claimed = [stores.leases.claim(model_lane(MODEL), "v") for _ in range(3)]
    assert [lease and lease.unit for lease in claimed] == [PLAN, "0", None]


def test_a_listing_goes_on_where_it_was_paused(stores: Stores, root: Path, hasty: None) -> None:
    """Again and again, under one token after the other, as if it had been one."""
    batch = record(stores, numbered(root, 40))
    for _ in range(20):
        lease = claim_listing(stores)
        with pytest.raises(ListingPaused):
            go_on(stores, lease, pausing=True)
        stores.leases.release(lease)
    go_on(stores, claim_listing(stores))
    found = now(stores, batch)
    assert (found.total, found.listing) == (40, False)
    assert listed_names(stores, batch) == [f"{number}.jpg" for number in range(40)]


def test_many_takeovers_leave_few_files(stores: Stores, root: Path, hasty: None) -> None:
    """Tables of chunks before the last two go; entries stay as long as they count."""
    batch = record(stores, numbered(root, 12))
    for _ in range(8):
        lease = claim_listing(stores)
        with pytest.raises(ListingPaused):
            go_on(stores, lease, pausing=True)
        stores.leases.release(lease)
    lost = claim_listing(stores)
    with ListingWriter(stores.batches.folder(batch.id), lost.token, MODEL) as writer:
        writer.add(Entry("never published"), Place("folder"))
        writer.close_chunk()
    stores.leases.release(lost)
    go_on(stores, claim_listing(stores))
    folder = stores.batches.folder(batch.id) / "manifest"
    kinds = Counter(path.name.partition(".")[2] for path in folder.iterdir())
    assert (kinds["plan.json"], kinds["chunks.bin"], kinds["entries.jsonl"]) == (2, 2, 9)
    assert listed_names(stores, batch) == [f"{number}.jpg" for number in range(12)]


def test_an_upload_is_kept_while_a_job_reads_it(stores: Stores) -> None:
    """Also over a rebuild; then it may go."""
    file = upload(stores, b"\0", purpose="vision")
    asked = CaptionSource(images=[ImagePlace(file=file.id)], model=MODEL, prompt="x")
    stores.batches.create(
        owner="ann", source=asked, endpoint=ENDPOINT, completion_window="24h", metadata=None
    )
    for _ in range(2):
        with pytest.raises(FileInUse):
            stores.files.delete("ann", file.id)
        stores.redis.flushall()
        stores.rebuild()
    go_on(stores, claim_listing(stores))
    stores.files.delete("ann", file.id)


def test_an_empty_set_fails_the_batch(stores: Stores, root: Path) -> None:
    """And says what counts as an image."""
    write(root / "notes.txt", "\0")
    batch = record(stores, root)
    go_on(stores, claim_listing(stores))
    found = now(stores, batch)
    assert found.state == BatchState.FAILED
    assert [(problem.code, problem.param) for problem in found.problems] == [
        ("image_set_unreadable", "images")
    ]
    assert "jpg" in found.problems[0].message


def test_a_listing_that_was_overtaken_changes_nothing(
    stores: Stores, root: Path, hasty: None
) -> None:
    """What it writes after its lease was lost is in files of its own, and nobody reads them."""
    batch = record(stores, numbered(root, 10))
    old = claim_listing(stores)
    folder = stores.batches.folder(batch.id)
    with pytest.raises(ListingPaused):
        go_on(stores, old, pausing=True)
    stores.redis.zadd("vlmq:leases", {f"{batch.id}|{PLAN}": 1})
    stores.leases.reap()
    new = claim_listing(stores, "other")
    assert new.token > old.token
    go_on(stores, new)
    names = listed_names(stores, batch)
    with pytest.raises(LeaseLost):
        ListingWriter(folder, old.token, MODEL)
    plan = Manifest(folder).plan
    with pytest.raises(LeaseLost):
        stores.batches.listed(old, plan.__class__(MODEL, 1, 1, complete=False))
    assert listed_names(stores, batch) == names == [f"{number}.jpg" for number in range(10)]
    stores.batches.listed(new, plan)  # its answer was lost, and it asks again


def test_an_old_writer_that_wakes_up_does_not_reach_the_new_ones_entries(
    stores: Stores, root: Path
) -> None:
    """Two writers at once: the one with the higher token counts from where it began."""
    folder = root / "batch"
    folder.mkdir()
    place = Place("folder", path="/x")
    with ListingWriter(folder, 1, MODEL) as first:
        first.add(Entry("a"), place)
        first.close_chunk()
        first.publish("a", complete=False)
        with ListingWriter(folder, 2, MODEL) as second:
            assert second.plan.cursor == "a"
            first.add(Entry("late"), place)
            first.close_chunk()
            first.publish("late", complete=True)
            second.add(Entry("b"), Place("tar", path="/y"))
            second.close_chunk()
            second.publish("b", complete=True)
            first.add(Entry("later"), place)
            first.close_chunk()
            first.publish("later", complete=True)
    manifest = Manifest(folder)
    assert (manifest.plan.chunks, manifest.plan.total, manifest.plan.cursor) == (2, 2, "b")
    texts = []
    for chunk in manifest.chunks():
        data = manifest.entries(chunk.index).read_bytes()
        texts.append(decode_entry(data[chunk.offset : chunk.offset + chunk.length]).name)
    assert texts == ["a", "b"]


def test_a_lost_redis_is_rebuilt_in_the_middle_of_a_listing(
    stores: Stores, root: Path, hasty: None
) -> None:
    """The listing goes on; who was at it is late."""
    batch = record(stores, numbered(root, 25))
    old = claim_listing(stores)
    with pytest.raises(ListingPaused):
        go_on(stores, old, pausing=True)
    stores.redis.flushall()
    stores.rebuild()
    found = now(stores, batch)
    assert (found.state, found.listing, found.total) == (BatchState.IN_PROGRESS, True, 1)
    with pytest.raises(LeaseLost):
        ListingWriter(stores.batches.folder(batch.id), old.token, MODEL)
    go_on(stores, claim_listing(stores))
    assert listed_names(stores, batch) == [f"{number}.jpg" for number in range(25)]
    stores.redis.flushall()
    stores.rebuild()
    found = now(stores, batch)
    assert (found.listing, found.total) == (False, 25)


def test_a_batch_that_is_cancelled_while_it_is_listed_accounts_for_what_was_listed(
    stores: Stores, root: Path, hasty: None
) -> None:
    """Each listed image has its line; the uncounted rest has none."""
    batch = record(stores, numbered(root, 25))
    lease = claim_listing(stores)
    with pytest.raises(ListingPaused):
        go_on(stores, lease, pausing=True)
    stores.leases.release(lease)
    stores.batches.cancel("ann", batch.id)
    final = stores.leases.claim(CONTROL_LANE, "w")
    assert final is not None
    run_control_unit(final, stores, Keeper(stores.leases, renew_s=5))
    found = now(stores, batch)
    assert (found.state, found.total, found.failed) == (BatchState.CANCELLED, 1, 1)
    page = stores.results.page("ann", batch.id, after=0, limit=10)
    assert page.complete
    assert b'"custom_id":"0.jpg"' in b"".join(page.blocks())


def test_a_name_that_comes_twice_gets_a_number(stores: Stores, root: Path, hasty: None) -> None:
    """Whoever lists the second one, and also if another is called like that."""
    path = write(root / "list.txt", "a.jpg\nb.jpg\na.jpg\na.jpg#5\na.jpg\n")
    batch = record(stores, path)
    for _ in range(2):
        lease = claim_listing(stores)
        with pytest.raises(ListingPaused):
            go_on(stores, lease, pausing=True)
        stores.leases.release(lease)
    go_on(stores, claim_listing(stores))
    names = listed_names(stores, batch)
    assert names == ["a.jpg", "b.jpg", "a.jpg#3", "a.jpg#5", "a.jpg#6"]


def lister(stores: Stores, folder: Path) -> subprocess.Popen[str]:
    """A process that lists what waits, and tells how much memory it took."""
    config = folder / "lister.json"
    write_json(config, snapshot(stores.settings))
    script = Path(__file__).parents[1] / "listing_child.py"
    return subprocess.Popen(
        [sys.executable, str(script), str(config)], stdout=subprocess.PIPE, text=True
    )


def has_more(stores: Stores, batch: Batch, listed: int) -> bool:
    """Whether more images are listed than that."""
    return now(stores, batch).total > listed


def test_kill_9_of_a_lister_loses_and_doubles_no_image(
    stores: Stores, root: Path, tmp_path: Path
) -> None:
    """Twice; the third one ends it, and every image is listed once, in order."""
    count = 60_000
    batch = record(stores, numbered(root, count))
    for _ in range(2):
        before = now(stores, batch).total
        child = lister(stores, tmp_path)
        try:
            wait_for(partial(has_more, stores, batch, before), "something to be listed", 30)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert before < now(stores, batch).total < count
        stores.leases.reap(["child"])
    assert lister(stores, tmp_path).wait(60) == 0
    found = now(stores, batch)
    assert (found.listing, found.total) == (False, count)
    assert listed_names(stores, batch) == [f"{number}.jpg" for number in range(count)]
    assert not list(stores.batches.folder(batch.id).glob("planning-*"))


def empty_files(folder: Path, count: int) -> Path:
    """A folder of so many files without anything in them."""
    folder.mkdir()
    for number in range(count):
        os.close(os.open(folder / f"{number}.jpg", os.O_CREAT | os.O_WRONLY))
    return folder


@pytest.mark.parametrize(("kind", "many"), [("list", 200_000), ("folder", 50_000)])
def test_memory_does_not_grow_with_the_set(
    stores: Stores, root: Path, tmp_path: Path, kind: str, many: int
) -> None:
    """A hundred times the entries take a few MiB more. Nothing is decoded."""
    peaks = []
    for count in (many // 100, many):
        path = root / f"folder-{count}"
        batch = record(
            stores, numbered(root, count) if kind == "list" else empty_files(path, count)
        )
        child = lister(stores, tmp_path)
        output, _ = child.communicate(timeout=100)
        assert child.returncode == 0
        peaks.append(int(output.split()[-1]))
        found = now(stores, batch)
        assert (found.total, found.listing) == (count, False)
        stores.batches.cancel("ann", batch.id)
        final = stores.leases.claim(CONTROL_LANE, "w")
        assert final is not None
        assert final.unit == FINAL
    assert peaks[1] - peaks[0] < 12 * 1024
