"""Rows come out of JSON lines and arrays one by one, whatever stands around and between them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DatasetInvalid, StorageFailed
from workers.training.row_files import RawRow, _ArraySplitter, read_rows

LIMIT = 1 << 20


def rows(path: Path, data: bytes, limit: int = LIMIT) -> list[RawRow]:
    path.write_bytes(data)
    return list(read_rows(path, limit, "training_file"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows"


class TestLines:
    def test_blank_lines_a_mark_and_carriage_returns_belong_to_no_row(self, path: Path) -> None:
        found = rows(path, b'\xef\xbb\xbf{"a":1}\r\n\r\n  \n{"b":2}\r\n{"c":3}')
        assert [(row.number, row.line) for row in found] == [(1, 1), (2, 4), (3, 5)]
        assert [json.loads(row.text) for row in found] == [{"a": 1}, {"b": 2}, {"c": 3}]

    def test_a_row_that_is_too_long_is_empty_and_the_next_is_whole(self, path: Path) -> None:
        found = rows(path, b'{"a":"' + b"x" * 300 + b'"}\n{"b":2}\n', limit=100)
        assert [row.text for row in found] == [b"", b'{"b":2}\n']

    def test_an_empty_file_has_no_rows(self, path: Path) -> None:
        assert rows(path, b"") == rows(path, b"\n \n") == []


class TestArrays:
    def test_rows_have_the_line_they_begin_in(self, path: Path) -> None:
        value = [{"a": {"b": [1, {"c": "}],\\"}]}}, {"d": '{"'}, {}]
        found = rows(path, b"\xef\xbb\xbf\n" + json.dumps(value, indent=2).encode())
        assert [json.loads(row.text) for row in found] == value
        assert [row.number for row in found] == [1, 2, 3]
        assert found[0].line == 3
        assert found[1].line == 13

    def test_a_row_that_is_too_long_is_empty_and_the_next_is_whole(self, path: Path) -> None:
        data = b'[{"a":"' + b"x" * 3_000_000 + b'"},{"b":2}]'
        assert [row.text for row in rows(path, data)] == [b"", b'{"b":2}']

    def test_a_million_brackets_are_one_bad_row(self, path: Path) -> None:
        deep = b'[{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b'},{"b":2}]'
        assert [row.text[:6] for row in rows(path, deep, 4 << 20)] == [b'{"a":[', b'{"b":2']

    def test_an_empty_array_has_no_rows(self, path: Path) -> None:
        assert rows(path, b"[ ]\n") == []

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b'[{"a":1}', "does not end"),
            (b'[{"a":1},', "does not end"),
            (b'[{"a":', "does not end"),
            (b'[{"a":"]}]', "does not end"),
            (b"[", "does not end"),
            (b'[{"a":1},]', "must be a JSON object"),
            (b'[,{"a":1}]', "must be a JSON object"),
            (b'[{"a":1}{"b":2}]', "must be a JSON object"),
            (b"[1, 2]", "must be a JSON object"),
            (b'[["a"]]', "must be a JSON object"),
            (b'[{"a":1}] []', "something follows"),
            (b'[{"a":1}]\0', "something follows"),
        ],
    )
    def test_a_broken_array_says_where(self, path: Path, data: bytes, what: str) -> None:
        with pytest.raises(DatasetInvalid, match=what) as caught:
            rows(path, data)
        assert caught.value.param == "training_file"
        assert ("row 1" in caught.value.message) == (b'{"a"' in data and not data.startswith(b"[,"))


values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
objects = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6)


@given(objects, st.integers(1, 50), st.sampled_from([None, 0, 3]), st.booleans())
def test_wherever_an_array_is_cut_into_blocks_its_rows_are_the_same(
    value: list[dict[str, Any]], block: int, indent: int | None, is_ascii: bool
) -> None:
    data = json.dumps(value, indent=indent, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    splitter = _ArraySplitter(LIMIT, "training_file")
    found = [
        row
        for start in range(0, len(data), block)
        for row in splitter.feed(data[start : start + block])
    ]
    splitter.finish()
    assert [json.loads(row.text) for row in found] == value
    assert [row.number for row in found] == list(range(1, len(value) + 1))
    cuts = [data.index(row.text) for row in found[:1]]
    assert [row.line for row in found[:1]] == [data.count(b"\n", 0, cut) + 1 for cut in cuts]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x1f\x8b\x08\x00", "unpack it"),
        (b"PK\x03\x04....", "unpack it"),
        ("﻿[]".encode("utf-16"), "UTF-8"),
    ],
)
def test_files_of_another_kind_are_told_what_they_are(path: Path, data: bytes, what: str) -> None:
    with pytest.raises(DatasetInvalid, match=what):
        rows(path, data)


def test_a_file_that_went_away_is_a_failure_of_storage(path: Path) -> None:
    with pytest.raises(StorageFailed):
        list(read_rows(path, LIMIT, "training_file"))


@pytest.mark.parametrize("array", [False, True])
def test_memory_does_not_grow_with_the_file(path: Path, array: bool) -> None:
    row = json.dumps({"conversations": ["x" * 200] * 5}).encode()
    with path.open("wb") as stream:
        stream.write(b"[" if array else b"")
        for number in range(20_000):
            stream.write((b"," if array and number else b"") + row + b"\n")
        stream.write(b"]" if array else b"")
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, LIMIT, "training_file"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8 << 20 < path.stat().st_size
