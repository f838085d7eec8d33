"""Fixtures for all tests: real programs only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running_node import RunningNode, running_node


@pytest.fixture(scope="session")
def node() -> Iterator[RunningNode]:
    """One node that serves the model ``echo``, shared by tests that break nothing."""
    with running_node() as running:
        yield running


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder for one test's records."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    return folder
