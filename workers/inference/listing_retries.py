"""The entries of an image set that failed in a batch that has ended, to be asked about again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import dropwhile

import msgspec

from shared.captions import Entry
from shared.errors import ImageSetUnreadable, InvalidRequest, NotFound
from shared.jobs import BatchSpec
from shared.manifest import Manifest
from shared.stores import Stores
from workers.inference.chunk_input import PlacesOf, entry_lines, entry_of
from workers.inference.listing_base import Found


def find_failed(
    spec: BatchSpec, after: object, stores: Stores, keep_going: Callable[[], None]
) -> Iterator[Found]:
    """The failed entries of the batch that ``spec`` retries, in their order.

    Files are taken as they are now; members of an archive that changed fail again. A cursor is the
    number of an entry of that batch. Raises: ImageSetUnreadable if it is gone; StorageFailed.
    """
    done = 0 if after is None else int(str(after))
    try:
        batch = stores.batches.get(spec.owner, spec.retry_of or "")
        manifest = Manifest(stores.batches.folder(batch.id))
        failed = stores.results.failed_lines(batch)
        for chunk, numbers in dropwhile(lambda item: max(item[1]) <= done, failed):
            keep_going()
            places = PlacesOf(manifest.places(chunk.index))
            for line in entry_lines(manifest, chunk):
                if line.number in numbers and line.number > done:
                    entry = entry_of(line)
                    place = places.at(entry.place)
                    yield Found(_as_it_is_now(entry), place, line.number)
    except (NotFound, InvalidRequest) as error:
        raise ImageSetUnreadable(f"the batch to retry cannot be read: {error.message}") from None


def _as_it_is_now(entry: Entry) -> Entry:
    if entry.mtime_ns is None:
        return entry
    return msgspec.structs.replace(entry, size=None, mtime_ns=None)
