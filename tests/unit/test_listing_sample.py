"""Samples of image sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from shared.captions import Entry, Place, Sample
from workers.inference import listing_sample
from workers.inference.listing_base import Found
from workers.inference.listing_sample import take_sample

PLACE = Place("folder", path="/")


def images(count: int) -> Iterator[Found]:
    """Images named by their numbers."""
    return (Found(Entry(str(number)), PLACE, number) for number in range(count))


def chosen(count: int, size: int, seed: int = 0) -> list[int]:
    """The numbers of the images that a sample holds."""
    return [
        int(found.entry.name) for found in take_sample(images(count), Sample(size, seed)).images
    ]


def test_a_sample_is_in_the_sets_order_and_of_the_size_asked() -> None:
    """Each image at most once."""
    found = chosen(1000, 64)
    assert found == sorted(set(found))
    assert len(found) == 64


def test_a_small_set_is_taken_whole() -> None:
    """However many are asked for."""
    sampled = take_sample(images(5), Sample(64))
    assert (len(sampled.images), sampled.seen, sampled.seen_all) == (5, 5, True)
    assert take_sample(images(0), Sample(64)).images == []


def test_the_seed_alone_chooses() -> None:
    """Again and again the same."""
    assert chosen(500, 10, seed=1) == chosen(500, 10, seed=1)
    assert chosen(500, 10, seed=1) != chosen(500, 10, seed=2)


def test_every_part_of_the_set_is_as_likely() -> None:
    """Over many seeds each tenth gets about a tenth."""
    tenths = Counter(number // 10 for seed in range(400) for number in chosen(100, 10, seed))
    assert set(tenths) == set(range(10))
    assert all(320 < count < 480 for count in tenths.values())


def test_a_huge_set_is_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; what comes after is not even listed."""
    monkeypatch.setattr(listing_sample, "LISTED_IMAGES", 100)
    endless = images(10**9)
    sampled = take_sample(endless, Sample(8))
    assert (sampled.seen, sampled.seen_all, len(sampled.images)) == (100, False, 8)
    assert next(endless).cursor == 101
