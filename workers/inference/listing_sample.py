"""A few images of a set, spread over what can be listed quickly: what a pre-flight runs on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import msgspec

from shared.captions import Sample
from workers.inference.listing_base import Found

LISTED_S = 10.0
"""How long images are looked at; of a larger set, the sample is of its first ones."""
LISTED_IMAGES = 1_000_000


class Sampled(msgspec.Struct, frozen=True):
    """The chosen images in the set's order; of how many, and whether the set has no more."""

    images: list[Found]
    seen: int
    seen_all: bool


def take_sample(found: Iterable[Found], sample: Sample) -> Sampled:
    """Choose evenly among the images, and by the seed alone if the set is listed in time."""
    random_numbers = random.Random(sample.seed)
    kept: list[tuple[int, Found]] = []
    ends_at = time.monotonic() + LISTED_S
    seen, seen_all = 0, True
    for image in found:
        if seen >= LISTED_IMAGES or (seen and time.monotonic() > ends_at):
            seen_all = False
            break
        if len(kept) < sample.images:
            kept.append((seen, image))
        elif (place := random_numbers.randrange(seen + 1)) < sample.images:
            kept[place] = (seen, image)
        seen += 1
    kept.sort(key=lambda item: item[0])
    return Sampled([image for _, image in kept], seen, seen_all)
