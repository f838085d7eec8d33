"""The held-out split: by chance that a seed fixes, whole groups, within its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.training.split import choose, rank, target


@pytest.mark.parametrize(
    ("rows", "share", "wanted"),
    [(100, 0.1, 10), (4, 0.1, 1), (1, 0.5, 0), (100, 0, 0), (10, 0.9, 5), (15, 0.1, 2)],
)
def test_the_share_of_rows_but_one_at_least_and_half_at_most(
    rows: int, share: float, wanted: int
) -> None:
    assert target(rows, share) == wanted


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(0, 100), st.integers(0, 100))
def test_never_more_than_wanted(sizes: list[int], wanted: int, most: int) -> None:
    groups = [(b"%d" % index, size) for index, size in enumerate(sizes)]
    chosen = choose(groups, wanted, most)
    held = sum(size for key, size in groups if key in chosen)
    assert held <= wanted
    assert held <= most or len(chosen) == 1
    if most and any(size <= wanted for size in sizes):
        assert chosen


def test_another_seed_is_another_order() -> None:
    keys = [b"%d" % number for number in range(50)]
    orders = [sorted(keys, key=lambda key: rank(seed, key)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
