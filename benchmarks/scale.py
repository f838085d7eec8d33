"""How large a run is."""

from __future__ import annotations

import msgspec


class Scale(msgspec.Struct, frozen=True):
    """Sizes of everything that is measured; the targets are meant for the defaults."""

    items: int = 100_000
    plain_items: int = 5_000
    """Per round: Celery's rate does not depend on it, and it is slow."""
    rounds: int = 3
    memory_items: tuple[int, int] = (100_000, 1_000_000)
    chat_samples: int = 300
    load_batches: int = 20
    """Batches of ``items`` that saturate the node while chats are measured."""
    streams: int = 200
    stream_rounds: int = 3
    images: int = 50_000
    """Files of the folder, and members of the tar."""
    side_images: int = 20_000
    """The same for the rows with larger and smaller tiles."""
    entries: int = 1_000_000
    """Of an image set that is listed and not run."""
    training_s: float = 15
    """For how long each program trains, alone or beside another."""


FULL = Scale(images=1_000_000, entries=10_000_000)
"""Image sets as large as people have them: about an hour more."""

QUICK = Scale(
    items=20_000,
    plain_items=1_000,
    rounds=1,
    memory_items=(10_000, 100_000),
    chat_samples=50,
    stream_rounds=1,
    images=5_000,
    side_images=2_000,
    entries=200_000,
    training_s=3,
)
"""A smoke test of some two minutes; its figures mean little."""
