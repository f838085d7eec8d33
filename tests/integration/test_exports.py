"""Exports of a batch's results, over a real API, read back with the libraries that they are for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.errors import EngineError
from shared.settings import with_overrides
from shared.stores import Stores
from tests.conftest import connected
from tests.datasets import jpeg
from tests.exports import Exporter, answered, asking, caption, inline, json_lines
from tests.faults.batches import line
from tests.integration.api_server import ApiServer, running_api


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    """One API for all tests; batches are worked on by the tests themselves."""
    with running_api() as server:
        yield server


@pytest.fixture(scope="module")
def stores(api: ApiServer) -> Iterator[Stores]:
    queue = {"chunk_items": 4, "min_chunk_items": 4}
    with connected(with_overrides(api.settings, queue=queue)) as found:
        yield found


@pytest.fixture
def export(api: ApiServer) -> Exporter:
    return Exporter(f"http://127.0.0.1:{api.port}")


def mixed(number: int) -> Any:
    """Every fifth line fails."""
    return EngineError() if number % 5 == 0 else caption(number)


def rows(api: ApiServer, batch_id: str, **query: Any) -> httpx.Response:
    return httpx.get(f"{api.base_url}/batches/{batch_id}/rows", params=query)


def test_rows_are_flat_and_in_order(api: ApiServer, stores: Stores) -> None:
    """Each line with what was asked, page by page, failed ones among them."""
    lines = [asking(f"{n}.jpg", f"/photos/{n}.jpg") for n in range(1, 8)]
    lines[2] = asking("inline", inline(jpeg(1)))
    lines[3] = line("text", "say 4")
    batch = answered(stores, lines, mixed)
    found, after = [], "0"
    while True:
        page = rows(api, batch.id, after=after, limit=3)
        found += [json.loads(text) for text in page.text.splitlines()]
        after = page.headers["vlmq-next-after"]
        if page.headers["vlmq-complete"] == "true":
            break
    assert [row["line"] for row in found] == list(range(1, 8))
    assert found[0] == {
        "line": 1,
        "custom_id": "1.jpg",
        "image": "/photos/1.jpg",
        "prompt": "What is it?",
        "caption": caption(1),
        "model": "echo",
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "error_code": None,
        "error": None,
    }
    assert found[2]["image"] is None
    assert found[3]["prompt"] == "say 4"
    assert (found[4]["caption"], found[4]["error_code"]) == (None, "engine_error")
    assert found[4]["image"] == "/photos/5.jpg"
    [asked] = rows(api, batch.id, after=2, limit=1, messages="true").json()["messages"]
    assert asked["content"][0]["image_url"]["url"] == inline(jpeg(1))


@pytest.mark.parametrize("form", ["jsonl", "parquet", "llava", "openai", "webdataset", "txt"])
def test_every_format_is_written(
    form: str, stores: Stores, export: Exporter, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    lines = []
    for number in range(1, 13):
        (photos / f"{number}.jpg").write_bytes(jpeg(number))
        lines.append(asking(f"{number}.jpg", f"{photos}/{number}.jpg"))
    batch = answered(stores, lines, mixed)
    target = photos if form == "txt" else tmp_path / "out"
    assert export(batch, form, target) == 0
    if form == "jsonl":
        assert len(json_lines(target)) == 12
