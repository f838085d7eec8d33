"""Listing an image set: its entries stream into the manifest, and chunks of them become claimable.

Memory does not grow with the set. Whoever lists may die at any moment; the next one goes on behind the
last entry that was published.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Self

import msgspec

from shared.batches import synced_set
from shared.caption_sets import Asking, CaptionSet, model_identity
from shared.captions import CaptionSource, Entry, Sample, SyncPlan
from shared.errors import (
    ImageSetUnreadable,
    ModelNotFound,
    QueueUnavailable,
    VlmqError,
    WorkerCrashed,
)
from shared.jobs import BatchProblem
from shared.leases import Lease, model_lane
from shared.listing import ListingWriter
from shared.log import get_logger
from shared.manifest import Manifest
from shared.settings import QueueSettings
from shared.storage import storage_errors
from shared.stores import Stores
from workers.inference.chunk_input import entry_lines
from workers.inference.entry_images import EntryImages
from workers.inference.image_files import ImageRoots
from workers.inference.image_sources import OpenUpload
from workers.inference.listing_base import IMAGE_SUFFIXES, Found, Surroundings
from workers.inference.listing_retries import find_failed
from workers.inference.listing_sample import take_sample
from workers.inference.listing_sources import find_images
from workers.inference.planning import Rejected
from workers.inference.recognizing import Recognizer
from workers.inference.seen_names import SeenNames
from workers.keeper import until_answered

log = get_logger(__name__)

PUBLISH_S = 1.0
"""How often what was listed becomes claimable."""
FIRST_PUBLISH_S = 0.1
SLICES = 5
"""How many slices of a ticket a listing may go on while other work waits; and how many times longer
than it needed to begin."""
SAMPLE_CHUNK = 4
"""Images of a sample that one process takes at a time."""
_TICK_EVERY = 256
_OF_ONE_NAME_EACH = frozenset({"folder", "image"})
"""In other places two entries may have the same name."""


class ListingPaused(VlmqError):
    """The listing gives its worker to others for a while."""

    code = "listing_paused"


class _Names:
    """Makes names unique; nothing is kept for sources whose names are."""

    def __init__(self, folder: Path, scratch: Path, listed: int) -> None:
        self._folder = folder
        self._scratch = scratch
        self._listed = listed
        self._opened = ExitStack()
        self._seen: SeenNames | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def unique(self, entry: Entry, number: int) -> Entry:
        """The entry, under a name that none before it has."""
        if self._seen is None:
            self._seen = self._opened.enter_context(SeenNames(self._scratch))
            if self._listed:
                self._remember(self._seen, Manifest(self._folder))
        name = self._seen.unique(entry.name, number)
        return entry if name == entry.name else msgspec.structs.replace(entry, name=name)

    def _remember(self, seen: SeenNames, manifest: Manifest) -> None:
        for chunk in manifest.chunks():
            for line in entry_lines(manifest, chunk):
                seen.add(line.custom_id() or "")


class Listing:
    """One worker's part in listing the image set of the batch that ``lease`` is about.

    ``keep_going`` may raise to stop; ``draining`` says whether to stop at the next good moment.
    """

    def __init__(
        self,
        lease: Lease,
        source: CaptionSource,
        stores: Stores,
        open_upload: OpenUpload,
        *,
        keep_going: Callable[[], None],
        draining: Callable[[], bool],
    ) -> None:
        self._lease = lease
        self._source = source
        self._stores = stores
        # A retry of a sample has the failed images of that sample.
        self._sample = source.sample if lease.spec.retry_of is None else None
        self._open_upload = open_upload
        self._keep_going = keep_going
        self._draining = draining
        self._folder = stores.batches.folder(lease.batch_id)
        self._began_at = time.monotonic()
        self._publish_at = self._began_at + FIRST_PUBLISH_S
        self._pause_at: float | None = None
        self._chunks_told = 0

    def run(self) -> None:
        """List until the end.

        Raises: Rejected if nothing of it can be run; ListingPaused; StorageFull, StorageFailed, QueueUnavailable; the unit may
        then be tried again.
        """
        with ListingWriter(self._folder, self._lease.token, self._source.model) as writer:
            if writer.plan.complete:
                self._tell(writer)  # only this was left to do
                return
            self._chunks_told = writer.chunks
            self._check(writer)
            scratch = self._scratch()
            try:
                self._list(writer, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _check(self, writer: ListingWriter) -> None:
        """Raise Rejected, or note what keeps the listing from going on."""
        settings, owner = self._stores.settings.queue, self._lease.spec.owner
        if writer.total == 0 and not self._stores.models.knows(self._source.model, owner):
            error = ModelNotFound(f"there is no model '{self._source.model}'", param="model")
            raise Rejected(0, _problem(error))
        if self._lease.attempts >= settings.max_chunk_attempts:
            message = "listing the image set kept failing"
            if writer.total == 0:
                raise Rejected(0, BatchProblem(WorkerCrashed.code, message))
            message += f"; what comes after its first {writer.total:,} images was not listed"
            writer.note(BatchProblem(WorkerCrashed.code, message))

    def _list(self, writer: ListingWriter, scratch: Path) -> None:
        cursor = writer.plan.cursor
        if not writer.problems:
            try:
                with _Names(self._folder, scratch, writer.total) as names:
                    if self._sample is not None:
                        self._add_sample(writer, self._sample, names, scratch)
                        return
                    with self._found(writer, cursor, scratch) as entries:
                        for found in entries:
                            cursor = found.cursor
                            self._add(writer, found, names)
            except ImageSetUnreadable as error:
                if writer.total == 0:
                    raise Rejected(0, _problem(error)) from None
                writer.note(_problem(error))
        _require_images(writer.total + (writer.sync.passed if writer.sync else 0))
        self._publish(writer, cursor, complete=True)
        log.info("image_set_listed", batch_id=self._lease.batch_id, images=writer.total)

    def _add_sample(
        self, writer: ListingWriter, sample: Sample, names: _Names, scratch: Path
    ) -> None:
        """List a few images, in chunks so small that every process gets some."""
        sampled = take_sample(find_images(self._source, None, self._around(scratch)), sample)
        _require_images(sampled.seen)
        for number, found in enumerate(sampled.images):
            if number % SAMPLE_CHUNK == 0:
                writer.close_chunk()
            writer.add(names.unique(found.entry, number + 1), found.place)
        writer.close_chunk()
        writer.publish(None, complete=True, seen=sampled.seen, seen_all=sampled.seen_all)
        self._tell(writer)

    @contextmanager
    def _found(
        self, writer: ListingWriter, cursor: object, scratch: Path
    ) -> Iterator[Iterator[Found]]:
        """The entries behind ``cursor``; those of a synced set with what is known of them."""
        found = self._find(cursor, scratch)
        if self._source.sync is None:
            yield found
            return
        spec = self._lease.spec
        settings = self._stores.settings
        with (
            CaptionSet(self._stores.layout.caption_set_dir(synced_set(spec))) as known,
            closing(EntryImages(settings.images, self._open_upload, _no_address)) as images,
        ):
            if writer.sync is None:
                writer.sync = SyncPlan(known.generation + 1, self._model_identity())
            asking = Asking(self._source, writer.sync.model)
            # All that a retry asks for again is wanted, also if it was captioned meanwhile.
            only_new = self._source.sync.only_new and spec.retry_of is None
            with Recognizer(
                self._source, asking, known, images, scratch, only_new=only_new
            ) as recognizer:
                if writer.total:
                    recognizer.remember(Manifest(self._folder), self._keep_going)
                yield recognizer.recognise(found, writer.total + 1)

    def _model_identity(self) -> str:
        record = self._stores.models.by_name().get(self._source.model)  # not a second old
        if record is None:
            error = ModelNotFound(f"there is no model '{self._source.model}'", param="model")
            raise Rejected(0, _problem(error))
        return model_identity(record)

    def _find(self, cursor: object, scratch: Path) -> Iterator[Found]:
        if self._lease.spec.retry_of is not None:
            return find_failed(self._lease.spec, cursor, self._stores, self._keep_going)
        return find_images(self._source, cursor, self._around(scratch))

    def _around(self, scratch: Path) -> Surroundings:
        images = self._stores.settings.images
        return Surroundings(
            roots=ImageRoots(images.roots, images.max_bytes),
            open_upload=self._open_upload,
            scratch=scratch,
            keep_going=self._keep_going,
            max_image_bytes=images.max_bytes,
            columns=self._source.columns,
        )

    def _add(self, writer: ListingWriter, found: Found, names: _Names) -> None:
        if self._source.sync is not None:
            _count(writer, found)
        if not found.passed:
            self._add_entry(writer, found, names)
        if time.monotonic() >= self._publish_at:
            self._publish(writer, found.cursor, complete=False)
            self._pause()

    def _add_entry(self, writer: ListingWriter, found: Found, names: _Names) -> None:
        settings = self._stores.settings.queue
        entry = found.entry
        if found.place.type not in _OF_ONE_NAME_EACH:
            entry = names.unique(entry, writer.total + 1)
        writer.add(entry, found.place)
        if writer.filling >= _fair(writer.total, settings) or (
            writer.filling_bytes > settings.chunk_bytes
        ):
            writer.close_chunk()
        if writer.total % _TICK_EVERY == 0:
            self._keep_going()

    def _publish(self, writer: ListingWriter, cursor: object, *, complete: bool) -> None:
        writer.close_chunk()
        writer.publish(cursor, complete=complete)
        self._tell(writer)
        self._publish_at = time.monotonic() + PUBLISH_S

    def _tell(self, writer: ListingWriter) -> None:
        """Let Redis, and then whoever waits, know of the chunks."""
        plan = writer.plan
        until_answered(lambda: self._stores.batches.listed(self._lease, plan), self._keep_going)
        new, self._chunks_told = plan.chunks - self._chunks_told, plan.chunks
        try:
            window = self._stores.settings.queue.ticket_window
            self._stores.tickets.batch(plan.model, min(new, window))
        except QueueUnavailable:
            log.warning("ticket_not_published")  # the reaper publishes what is missing

    def _pause(self) -> None:
        """Give the unit back if this worker is wanted for something else."""
        now = time.monotonic()
        if self._pause_at is None:
            slice_s = self._stores.settings.queue.slice_s
            self._pause_at = now + SLICES * max(slice_s, now - self._began_at)
        if self._draining():
            raise ListingPaused()
        if now < self._pause_at:
            return
        if self._stores.leases.demand(model_lane(self._source.model), limit=1):
            raise ListingPaused()

    def _scratch(self) -> Path:
        with storage_errors(self._folder):
            for stale in self._folder.glob("planning-*"):
                shutil.rmtree(stale, ignore_errors=True)  # what a killed listing left
            return Path(tempfile.mkdtemp(prefix="planning-", dir=self._folder))


def _require_images(found: int) -> None:
    """Raises: Rejected if there are none."""
    if found == 0:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        message = (
            f"the set holds no images, by the names of its files ({kinds}); archives and tables "
            "in a folder are listed if a pattern such as FOLDER/*.tar names them"
        )
        raise Rejected(0, BatchProblem(ImageSetUnreadable.code, message, "images"))


def _fair(total: int, settings: QueueSettings) -> int:
    """How many entries the chunk should have that ends after ``total``: more as the set grows."""
    fair = total // settings.spread_chunks
    return min(settings.chunk_items, max(settings.min_chunk_items, fair))


def _count(writer: ListingWriter, found: Found) -> None:
    """Note what a sync made of an entry."""
    sync = writer.sync
    assert sync is not None, "the set is not synced"
    writer.sync = msgspec.structs.replace(
        sync,
        known=sync.known + found.entry.known,
        duplicates=sync.duplicates + (found.entry.same_as is not None),
        passed=sync.passed + found.passed,
    )


def _no_address(url: str) -> bytes:
    raise AssertionError(f"a listing fetches nothing, and was to fetch {url}")


def _problem(error: VlmqError) -> BatchProblem:
    return BatchProblem(error.code, error.message, error.param)
