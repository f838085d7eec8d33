"""What a caption job's lines came of: as its end wrote it down, or as its shards say so far."""

from __future__ import annotations

from typing import Any

import msgspec

from shared.batches import BatchStore
from shared.shards import read_header, read_provenance, shard_path
from shared.storage import read_json

FIRST_CHUNKS = 64
"""Of a batch that runs, so many chunks are asked."""


def provenance(batches: BatchStore, owner: str, batch_id: str) -> list[dict[str, Any]]:
    """One entry per difference: model, words, parameters, versions, and how many chunks came of it.

    Empty for batches of files, and before a chunk is done. Raises: NotFound, StorageFailed.
    """
    folder = batches.folder(batches.get(owner, batch_id).id)
    written = read_json(folder / "provenance.json")
    if written is not None:
        return msgspec.convert(written, list[dict[str, Any]])
    found: dict[bytes, list[int]] = {}
    for chunk, token in enumerate(batches.committed_tokens(batch_id, 0, FIRST_CHUNKS)):
        path = shard_path(folder, chunk, token)
        if path.exists():  # else the batch has just ended
            said = read_provenance(path, read_header(path))
            if said:
                found.setdefault(said, [chunk, 0])[1] += 1
    return [
        {"first_chunk": first, "chunks": count, **msgspec.json.decode(said)}
        for said, (first, count) in found.items()
    ]
