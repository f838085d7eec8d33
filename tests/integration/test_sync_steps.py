"""A sync step by step on real stores: repeated, overtaken, rebuilt, cancelled, and very many images."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from shared.caption_sets import (
    Asking,
    Caption,
    SegmentWriter,
    add_generation,
    model_identity,
    segments,
    set_id,
)
from shared.captions import CaptionSource, Entry, ImagePlace, Place, Sync
from shared.chat import completion_body
from shared.errors import LeaseLost, SyncInProgress
from shared.jobs import Batch, BatchState
from shared.leases import CONTROL_LANE, FINAL, PLAN, Lease, model_lane
from shared.manifest import Manifest
from shared.retention import sweep
from shared.settings import snapshot, with_overrides
from shared.shards import ShardHeader, shard_path, write_shard
from shared.storage import write_json
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import ENDPOINT
from tests.image_sets import write
from tests.stored_batches import MODEL, link_model, now
from workers.inference import listing as listing_module
from workers.inference.batch_lines import item_id, output_line
from workers.inference.chunk_input import entry_lines, entry_of
from workers.inference.control import run_control_unit
from workers.inference.entry_identity import location_of, sighting_of
from workers.inference.listing import ListingPaused
from workers.inference.remembering import remember
from workers.keeper import Keeper


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
        queue={"lease_ttl_s": 30, "renew_s": 1, "min_chunk_items": 2, "chunk_items": 64},
    )
    with connected(settings) as found:
        link_model(found)
        yield found


def source(root: Path, sync: Sync = Sync("all")) -> CaptionSource:  # noqa: B008 - frozen
    """A sync of everything in the root."""
    images = [ImagePlace(path=str(root))]
    return CaptionSource(images=images, model=MODEL, prompt="say it", sync=sync)


def record(stores: Stores, root: Path, sync: Sync = Sync("all")) -> Batch:  # noqa: B008 - frozen
    """A sync that waits to be listed."""
    return stores.batches.create(
        owner="ann",
        source=source(root, sync),
        endpoint=ENDPOINT,
        completion_window="24h",
        metadata=None,
    )


def claim(stores: Stores, unit: str | None) -> Lease:
    """Claim this unit, or a chunk, in whichever lane it waits."""
    for lane in (CONTROL_LANE, model_lane(MODEL)):
        lease = stores.leases.claim(lane, "w")
        if lease is not None:
            assert lease.unit == unit or (unit is None and lease.unit.isdigit())
            return lease
    raise AssertionError("nothing waits")


def run(stores: Stores, lease: Lease, *, pausing: bool = False) -> None:
    """List or finalize."""
    run_control_unit(lease, stores, Keeper(stores.leases, renew_s=5), lambda: pausing)


def entries(stores: Stores, batch: Batch) -> list[Entry]:
    """The entries that were listed."""
    manifest = Manifest(stores.batches.folder(batch.id))
    return [entry_of(line) for chunk in manifest.chunks() for line in entry_lines(manifest, chunk)]


def answer_chunk(stores: Stores, batch: Batch) -> None:
    """Claim a chunk and write lines for it as a worker would, all asked for anew."""
    lease = claim(stores, None)
    folder = stores.batches.folder(batch.id)
    manifest = Manifest(folder)
    lines = []
    for line in entry_lines(manifest, manifest.chunk(int(lease.unit))):
        name = item_id(batch.id, line.number)
        body = completion_body(
            completion_id=name,
            created=1,
            model=MODEL,
            text=f"about {line.custom_id()}",
            finish_reason="stop",
            prompt_tokens=258,
            completion_tokens=2,
        )
        lines.append(output_line(name, line.custom_id() or "", body))
    output = b"".join(lines)
    header = ShardHeader(len(output), 0, len(lines), 0, 258 * len(lines), 2 * len(lines))
    write_shard(shard_path(folder, int(lease.unit), lease.token), header, output, b"")
    stores.batches.committed(lease, header, [])


def filled(root: Path, count: int) -> Path:
    """Files of their own bytes, which nobody decodes here."""
    for number in range(count):
        write(root / f"{number}.jpg", f"picture {number}")
    return root


def set_folder(stores: Stores) -> Path:
    """The one set's folder."""
    [folder] = stores.layout.captions.iterdir()
    return folder


def rows(stores: Stores) -> int:
    """Captions that the set has for the root's images."""
    [(_, _, path)] = segments(set_folder(stores))
    with closing(sqlite3.connect(path)) as base:
        return int(base.execute("select count(*) from captions").fetchone()[0])


def test_a_listing_that_goes_on_knows_the_duplicates_of_its_predecessors(
    stores: Stores, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever listed the first line, the later ones name it."""
    monkeypatch.setattr(listing_module, "FIRST_PUBLISH_S", 0.0)
    for number in range(6):
        write(root / f"{number}.jpg", f"picture {number % 2}")
    batch = record(stores, root)
    for _ in range(2):
        lease = claim(stores, PLAN)
        with pytest.raises(ListingPaused):
            run(stores, lease, pausing=True)
        stores.leases.release(lease)
    run(stores, claim(stores, PLAN))
    assert [entry.same_as for entry in entries(stores, batch)] == [None, None, 1, 2, 1, 2]
    found = now(stores, batch)
    assert (found.total, found.duplicates, found.listing) == (6, 4, False)


def test_a_finalizer_that_is_repeated_leaves_the_same(stores: Stores, root: Path) -> None:
    """One that died before the batch ended, one that woke up after, and one of a batch long ended."""
    batch = record(stores, filled(root, 4))
    run(stores, claim(stores, PLAN))
    answer_chunk(stores, batch)
    answer_chunk(stores, batch)
    dead = claim(stores, FINAL)
    keep = (stores.batches, stores.models, stores.layout, lambda: None)
    remember(dead, *keep)
    [before] = segments(set_folder(stores))
    stores.leases.reap(["w"])
    final = claim(stores, FINAL)
    with pytest.raises(LeaseLost):
        remember(dead, *keep)
    run(stores, final)
    assert now(stores, batch).state == BatchState.COMPLETED
    assert segments(set_folder(stores)) == [before]
    assert rows(stores) == 4
    with pytest.raises(LeaseLost):
        remember(dead, *keep)


def test_what_a_cancelled_batch_did_counts(stores: Stores, root: Path) -> None:
    """The next one asks for the rest only."""
    batch = record(stores, filled(root, 4))
    run(stores, claim(stores, PLAN))
    answer_chunk(stores, batch)
    stores.batches.cancel("ann", batch.id)
    run(stores, claim(stores, FINAL))
    assert now(stores, batch).state == BatchState.CANCELLED
    following = record(stores, root)
    run(stores, claim(stores, PLAN))
    assert [entry.known for entry in entries(stores, following)] == [True, True, False, False]
    assert now(stores, following).known == 2


def test_captions_of_a_model_that_was_replaced_meanwhile_are_not_kept(
    stores: Stores, root: Path
) -> None:
    """Nobody knows which of them are of which model."""
    batch = record(stores, filled(root, 4))
    run(stores, claim(stores, PLAN))
    answer_chunk(stores, batch)
    stores.models.link(MODEL, None, engine="echo", replace=True)
    answer_chunk(stores, batch)
    run(stores, claim(stores, FINAL))
    assert now(stores, batch).state == BatchState.COMPLETED
    assert rows(stores) == 0


def test_one_sync_at_a_time_also_over_a_lost_redis(stores: Stores, root: Path) -> None:
    """Whether it was listed or not; another owner's set of that name is another set."""
    batch = record(stores, filled(root, 2))
    for listed in (False, True):
        with pytest.raises(SyncInProgress, match=batch.id):
            record(stores, root)
        assert [path.name for path in stores.layout.batches.iterdir()] == [batch.id]
        stores.redis.flushall()
        stores.rebuild()
        with pytest.raises(SyncInProgress, match=batch.id):
            record(stores, root)
        if not listed:
            run(stores, claim(stores, PLAN))
    other = stores.batches.create(
        owner="bob",
        source=source(root),
        endpoint=ENDPOINT,
        completion_window="24h",
        metadata=None,
    )
    stores.batches.cancel("bob", other.id)
    run(stores, claim(stores, FINAL))
    answer_chunk(stores, batch)
    run(stores, claim(stores, FINAL))
    assert record(stores, root).id != batch.id


def test_a_set_that_failed_to_be_listed_may_be_synced_again(stores: Stores, root: Path) -> None:
    """A batch that failed holds nothing."""
    batch = record(stores, root)
    run(stores, claim(stores, PLAN))
    assert now(stores, batch).state == BatchState.FAILED
    assert record(stores, filled(root, 1)).state == BatchState.VALIDATING


def test_a_set_that_is_not_synced_any_more_is_forgotten_when_it_is_due(
    stores: Stores, root: Path
) -> None:
    """Only then, and only by the setting; what is asked next is asked anew."""
    settings = with_overrides(stores.settings, storage={"keep_caption_sets_days": 7})
    with connected(settings) as sweeping:
        for days, known in ((6, 2), (8, 0)):
            for _ in range(2):
                batch = record(stores, filled(root, 2))
                run(stores, claim(stores, PLAN))
                answer_chunk(stores, batch)
                run(stores, claim(stores, FINAL))
            then = time.time() - days * 86_400
            os.utime(set_folder(stores), (then, then))
            sweep(stores)
            assert set_folder(stores).exists()
            assert sweep(sweeping) == (known == 0)
            batch = record(stores, root)
            run(stores, claim(stores, PLAN))
            assert now(stores, batch).known == known
            stores.batches.cancel("ann", batch.id)
            run(stores, claim(stores, FINAL))


def learn_all(stores: Stores, batch: Batch, folder: Path) -> None:
    """Make all files of a folder known to the set, as if each had its own picture."""
    assert batch.source is not None
    place = Place("folder", path=str(folder))
    asking = Asking(batch.source, model_identity(stores.models.get(MODEL)))

    def fill(writer: SegmentWriter) -> None:
        for number, found in enumerate(os.scandir(folder)):
            status, content = found.stat(), f"{number:064x}"
            entry = Entry(found.name, size=status.st_size, mtime_ns=status.st_mtime_ns)
            location = location_of(entry, place)
            assert location is not None
            writer.add_sighting(location, sighting_of(entry, place, content, young=False))
            writer.add_caption(asking.key(content, None), Caption("a", "stop", 258, 1, 1, batch.id))

    add_generation(stores.layout.caption_set_dir(set_id("ann", batch.source)), 1, fill)


def test_a_hundred_thousand_images_are_recognised_in_little_memory(
    stores: Stores, root: Path, tmp_path: Path
) -> None:
    """Nothing is read but the index; a hundred times the images take a few MiB more."""
    write_json(tmp_path / "lister.json", snapshot(stores.settings))
    script = Path(__file__).parents[1] / "listing_child.py"
    peaks = []
    for count in (1000, 100_000):
        folder = root / str(count)
        folder.mkdir()
        for number in range(count):
            os.close(os.open(folder / f"{number}.jpg", os.O_CREAT | os.O_WRONLY))
        batch = record(stores, folder, Sync())
        learn_all(stores, batch, folder)
        command = [sys.executable, str(script), str(tmp_path / "lister.json")]
        peaks.append(int(subprocess.check_output(command, text=True, timeout=200).split()[-1]))
        found = now(stores, batch)
        assert (found.total, found.known, found.listing) == (count, count, False)
        stores.batches.cancel("ann", batch.id)
        claim(stores, FINAL)
    assert peaks[1] - peaks[0] < 12 * 1024
