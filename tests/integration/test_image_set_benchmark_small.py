"""The image-set benchmarks on a few hundred images: whole nodes, everything checked, no figures."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks import image_sets, listing
from benchmarks.report import Figure
from benchmarks.scale import Scale

pytestmark = pytest.mark.slow

TINY = msgspec.structs.replace(Scale(), images=600, side_images=300, entries=200_000)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    """The figures; no two have one name."""
    found = {figure.name: figure for figure in figures}
    assert len(found) == len(figures)
    return found


def test_both_caption_a_tar_and_a_folder() -> None:
    """Every line is checked in ``measure``; every row is there."""
    found = by_name(image_sets.measure(TINY))
    for kind in ("tar of 600", "folder of 600", "tar of 300, tiles of 448 px"):
        ours, plain = found[f"{kind}: vlmq"].value, found[f"{kind}: plain Python"].value
        assert found[f"{kind}: vlmq / plain Python"].value == pytest.approx(ours / plain)
        assert found[f"{kind}: vlmq / plain Python"].target is not None
    assert found["Redis resident"].passed
    assert {"peak memory of engine", "peak memory of batch consumer child"} <= found.keys()


def test_a_listing_that_is_killed_goes_on_and_is_cancelled() -> None:
    """Counted entry by entry in ``measure``."""
    found = by_name(listing.measure(TINY))
    assert found["entries listed, each once and in order"].value == TINY.entries
    assert found["Redis used"].passed
