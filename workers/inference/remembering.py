"""What a batch that syncs its set leaves behind for the next one, once it has ended.

Written from its committed shards before they go, however the batch ended: what was captioned counts.
A finalizer that is killed half way is repeated and writes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shared.batches import BatchStore, synced_set
from shared.caption_sets import Asking, SegmentWriter, add_generation, mark_used, model_identity
from shared.captions import SyncPlan
from shared.jobs import BatchSpec
from shared.leases import Lease
from shared.log import get_logger
from shared.manifest import Manifest
from shared.models import ModelRegistry
from shared.results import Part
from shared.shards import output_part, read_header, shard_path
from shared.storage import Layout, storage_errors
from workers.inference.chunk_input import PlacesOf, entry_lines, entry_of
from workers.inference.entry_identity import location_of, sighting_of
from workers.inference.recalling import decode_answer

log = get_logger(__name__)


def remember(
    lease: Lease,
    batches: BatchStore,
    models: ModelRegistry,
    layout: Layout,
    keep_going: Callable[[], None],
) -> None:
    """Add what the batch found out to what is known of its set, if it syncs one.

    Raises: LeaseLost, StorageFull, StorageFailed, QueueUnavailable, and what ``keep_going`` raises.
    """
    spec, folder = lease.spec, batches.folder(lease.batch_id)
    if not synced_set(spec) or not Manifest.exists(folder):
        return
    manifest = Manifest(folder)
    sync = manifest.plan.sync
    assert sync is not None, "a synced set's plan says so"
    learned = _Learned(spec, folder, manifest, sync)
    if not _is_same_model(models, spec, sync):
        log.warning("captions_not_remembered", batch_id=spec.id, why="the model was replaced")
        learned.with_captions = False
    commits = batches.commits(lease)

    def fill(writer: SegmentWriter) -> None:
        for chunk, token in commits:
            keep_going()
            learned.write(chunk, shard_path(folder, chunk, token), writer)

    known = layout.caption_set_dir(synced_set(spec))
    add_generation(known, sync.generation, fill)
    mark_used(known)


class _Learned:
    """What the shards of one batch say."""

    def __init__(self, spec: BatchSpec, folder: Path, manifest: Manifest, sync: SyncPlan) -> None:
        assert spec.source is not None, "only an image set is synced"
        self._spec = spec
        self._folder = folder
        self._manifest = manifest
        self._asking = Asking(spec.source, sync.model)
        self.with_captions = True

    def write(self, chunk: int, shard: Path, writer: SegmentWriter) -> None:
        """Write what a chunk found out: where its images lay, and their new captions."""
        part = Part(shard, *output_part(read_header(shard)))
        places = PlacesOf(self._manifest.places(chunk))
        entries = {}
        for line in entry_lines(self._manifest, self._manifest.chunk(chunk)):
            entry = entries[line.number] = entry_of(line)
            if entry.content is None or entry.noted:
                continue
            place = places.at(entry.place)
            location = location_of(entry, place)
            if location is not None:
                seen = sighting_of(entry, place, entry.content, entry.young)
                writer.add_sighting(location, seen)
        if not self.with_captions:
            return
        with storage_errors(shard), open(shard, "rb") as stream:
            for number, text in part.lines(stream):
                entry = entries[number]
                answer = decode_answer(text)
                if answer.is_new and entry.content is not None:
                    key = self._asking.key(entry.content, entry.texts)
                    writer.add_caption(key, answer.caption(self._spec.id))


def _is_same_model(models: ModelRegistry, spec: BatchSpec, sync: SyncPlan) -> bool:
    """Whether all answers are of the model that was there when the set was listed."""
    assert spec.source is not None, "only an image set is synced"
    record = models.by_name().get(spec.source.model)
    return record is not None and model_identity(record) == sync.model
