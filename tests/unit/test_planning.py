"""Cutting a batch's input into chunks, and what planning learns on the way."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.manifest import TOO_LONG, Chunk, Manifest, Plan
from shared.settings import QueueSettings
from workers.inference import planning
from workers.inference.batch_lines import read_chunk, split_lines
from workers.inference.planning import Rejected, plan_batch

BOM = b"\xef\xbb\xbf"


def request(custom_id: str, model: str = "echo", pad: int = 0) -> bytes:
    """A line as far as planning looks at it."""
    return json.dumps({"custom_id": custom_id, "body": {"model": model, "pad": "x" * pad}}).encode()


class Planner:
    """Plans files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "input"
        self.batch = folder / "batch"
        self.batch.mkdir()

    def __call__(
        self,
        content: bytes,
        *,
        known: Collection[str] = ("echo",),
        keep_going: Callable[[], None] = lambda: None,
        **limits: int,
    ) -> Plan:
        """Plan a file with this content."""
        self.source.write_bytes(content)
        return plan_batch(
            self.source,
            self.batch,
            QueueSettings(**limits),
            knows_model=lambda name: name in known,
            keep_going=keep_going,
        )

    def chunks(self) -> list[Chunk]:
        """The chunks of the plan."""
        return list(Manifest(self.batch).chunks())

    def lines(self) -> list[tuple[int, bytes]]:
        """Every line that consumers will see, with its number."""
        return [
            (line.number, line.text)
            for chunk in self.chunks()
            for line in split_lines(read_chunk(self.source, chunk), chunk.first_line)
        ]

    def duplicates(self) -> list[int]:
        """The lines whose custom_id was used before."""
        return sorted(Manifest(self.batch).duplicates(1, 1 << 40))


@pytest.fixture
def plan(tmp_path: Path) -> Planner:
    """A planner."""
    return Planner(tmp_path)


# --- chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "fewest", "most"), [(10, 1, 1), (500, 31, 33), (2_000, 60, 68), (40_000, 150, 175)]
)
def test_a_small_batch_is_cut_small_enough_for_all_workers(
    plan: Planner, items: int, fewest: int, most: int
) -> None:
    """Some sixty chunks, or as many as hold 256 lines each, or 16."""
    plan(b"\n".join(request(f"i{n:06}") for n in range(items)))
    chunks = plan.chunks()
    assert fewest <= len(chunks) <= most
    assert max(chunk.items for chunk in chunks) <= 256


def test_chunks_are_cut_by_items(plan: Planner) -> None:
    """The last one holds the rest."""
    content = b"".join(request(f"i{n}") + b"\n" for n in range(10))
    assert plan(content, chunk_items=4) == Plan("echo", 3, 10)
    assert [chunk.items for chunk in plan.chunks()] == [4, 4, 2]
    assert [chunk.first_line for chunk in plan.chunks()] == [1, 5, 9]
    assert sum(chunk.length for chunk in plan.chunks()) == len(content)
    assert [Manifest(plan.batch).chunk(index) for index in range(3)] == plan.chunks()


def test_chunks_are_cut_by_bytes(plan: Planner) -> None:
    """A chunk never grows over the limit, unless one line alone does."""
    sizes = [10, 10, 300, 10, 2000, 10]
    content = b"".join(request(f"i{n}", pad=size) + b"\n" for n, size in enumerate(sizes))
    plan(content, chunk_items=100, chunk_bytes=500)
    chunks = plan.chunks()
    assert [chunk.items for chunk in chunks] == [3, 1, 1, 1]
    assert all(chunk.length <= 500 or chunk.items == 1 for chunk in chunks)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_line_endings_make_no_difference(plan: Planner, ending: bytes, is_finished: bool) -> None:
    """Windows' are read, and the last line needs none."""
    lines = [request(f"i{n}") for n in range(5)]
    content = ending.join(lines) + (ending if is_finished else b"")
    assert plan(content, chunk_items=2).total == 5
    assert [(n, text.strip()) for n, text in plan.lines()] == list(enumerate(lines, 1))


def test_blank_lines_count_in_numbers_only(plan: Planner) -> None:
    """As an editor counts, so that a message finds its line."""
    content = b"\n" + request("a") + b"\n \t\r\n\n" + request("b") + b"\n\n\n"
    assert plan(content).total == 2
    assert plan.lines() == [(2, request("a")), (5, request("b"))]


def test_a_byte_order_mark_is_passed_over(plan: Planner) -> None:
    """Editors on Windows put one there; it is not a part of the first line."""
    plan(BOM + request("a") + b"\n" + request("b") + b"\n" + request("a"), chunk_items=1)
    assert plan.lines()[0] == (1, request("a"))
    assert plan.duplicates() == [3]


def test_a_file_of_nothing_but_a_byte_order_mark_is_empty(plan: Planner) -> None:
    """There is no request in it."""
    with pytest.raises(Rejected) as rejected:
        plan(BOM)
    assert (rejected.value.total, rejected.value.problem.code) == (0, "empty_file")


def test_an_over_long_line_is_a_chunk_that_nobody_reads(plan: Planner) -> None:
    """It counts as one item; its neighbours are as usual, and line numbers go on."""
    content = b"\n".join([request("a"), request("b"), b"x" * 5000, request("c"), request("d")])
    assert plan(content, max_line_bytes=1000, chunk_items=10).total == 5
    assert [chunk.items for chunk in plan.chunks()] == [2, 1, 2]
    assert plan.chunks()[1].length == TOO_LONG
    assert [number for number, _ in plan.lines()] == [1, 2, 3, 4, 5]
    assert plan.lines()[2] == (3, b"")


@pytest.mark.parametrize(("extra", "is_read"), [(0, True), (1, False)])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n"])
def test_the_longest_line_has_exactly_the_limit(
    plan: Planner, extra: int, is_read: bool, ending: bytes
) -> None:
    """Its newline is not counted."""
    first = request("a")
    text = first.ljust(300 + extra)
    assert plan(first + b"\n" + text + ending, max_line_bytes=300).total == 2
    assert (plan.lines()[1][1] == text) is is_read


def test_an_over_long_line_is_never_in_memory(plan: Planner) -> None:
    """A file may be one line of many gigabytes."""
    plan.source.touch()
    with open(plan.source, "wb") as stream:
        stream.write(request("a") + b"\n")
        stream.seek(200 << 20)
        stream.write(b"\n" + request("b"))
    tracemalloc.start()
    try:
        found = plan_batch(
            plan.source,
            plan.batch,
            QueueSettings(max_line_bytes=1 << 20),
            knows_model=lambda name: True,
            keep_going=lambda: None,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.total == 3
    assert peak < 20 << 20


def test_memory_does_not_grow_with_the_file(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the lines, no more of it."""
    monkeypatch.setattr(planning, "_SPILL_EVERY", 1024)

    def peak(count: int) -> int:
        folder = plan.folder / str(count)
        folder.mkdir()
        source = folder / "input"
        with open(source, "wb") as stream:
            stream.writelines(request(f"item-{n}") + b"\n" for n in range(count))
        tracemalloc.start()
        try:
            plan_batch(
                source,
                folder,
                QueueSettings(),
                knows_model=lambda name: True,
                keep_going=lambda: None,
            )
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4_000)
    assert peak(32_000) < peak(4_001) + 200_000


@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from([b"", b" ", b"\t\r", b"{", b"\xff\xfe", b"y" * 70]),
            st.integers(0, 3).map(lambda n: request(f"i{n}")),
        ),
        max_size=30,
    ),
    is_finished=st.booleans(),
    items=st.integers(1, 5),
    size=st.integers(1, 200),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_the_file_each_line_is_in_one_chunk(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[bytes],
    is_finished: bool,
    items: int,
    size: int,
) -> None:
    """Planner and consumers agree on the lines, their numbers and their count."""
    plan = Planner(tmp_path_factory.mktemp("plan"))
    content = b"\n".join([*pieces, request("z")]) + (b"\n" if is_finished else b"")
    found = plan(content, chunk_items=items, chunk_bytes=size, max_line_bytes=60)
    wanted = [
        (number, text if len(text) <= 60 else b"")
        for number, text in enumerate(content.split(b"\n"), 1)
        if text.strip() or len(text) > 60
    ]
    assert plan.lines() == wanted
    assert found.total == len(wanted) == sum(chunk.items for chunk in plan.chunks())
    assert all(chunk.items <= items for chunk in plan.chunks())


# --- duplicates -------------------------------------------------------------------------------


def test_repeated_custom_ids_are_found(plan: Planner) -> None:
    """Every use but the first, however far apart; broken lines have none."""
    ids = ["a", "b", "a", "c", "b", "a"]
    content = b"\n".join([*map(request, ids), b"{broken", request("a")])
    plan(content, chunk_items=2)
    assert plan.duplicates() == [3, 5, 6, 8]


def test_they_are_found_across_spilled_files(
    plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file's hashes go to disk; the pair may lie in different parts, or one in memory."""
    monkeypatch.setattr(planning, "_SPILL_EVERY", 100)
    ids = [f"item-{number}" for number in range(1050)]
    ids[777], ids[1040] = ids[3], ids[500]
    plan(b"\n".join(map(request, ids)))
    assert plan.duplicates() == [778, 1041]


def test_over_long_ids_are_not_kept_to_compare(plan: Planner) -> None:
    """They are refused for their length anyway, and would fill the memory."""
    ids = ["x" * 512, "y" * 513, "x" * 512, "y" * 513]
    plan(b"\n".join(map(request, ids)))
    assert plan.duplicates() == [3]


def test_equal_hashes_are_not_equal_ids(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspects are compared in full."""
    monkeypatch.setattr(planning, "hash", len, raising=False)
    plan(b"\n".join(map(request, ["aa", "bb", "cc", "bb", "d"])))
    assert plan.duplicates() == [4]


def test_without_repetition_the_file_is_read_once(plan: Planner) -> None:
    """And no list of duplicates is written."""
    plan(b"\n".join(map(request, "abc")))
    assert not (plan.batch / "manifest" / "duplicates.bin").exists()
    assert plan.duplicates() == []


def test_too_many_duplicates_fail_the_batch(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded for them, too."""
    monkeypatch.setattr(planning, "_MAX_REPEATED_IDS", 3)
    ids = [str(number) for number in range(5)] * 2
    with pytest.raises(Rejected) as rejected:
        plan(b"\n".join(map(request, ids)))
    assert (rejected.value.total, rejected.value.problem.code) == (10, "duplicate_custom_id")


# --- models -----------------------------------------------------------------------------------


def test_the_first_known_model_is_the_batchs(plan: Planner) -> None:
    """Lines before it that name others are told later."""
    lines = [b"{broken", request("a", "nobody"), request("b", "two"), request("c", "one")]
    assert plan(b"\n".join(lines), known=("one", "two")).model == "two"


def test_a_file_of_unknown_models_names_the_first(plan: Planner) -> None:
    """With its line."""
    with pytest.raises(Rejected) as rejected:
        plan(b"\n\n{\n" + request("a", "x") + b"\n" + request("b", "y"))
    problem = rejected.value.problem
    assert (rejected.value.total, problem.code) == (3, "model_not_found")
    assert (problem.line, problem.param) == (4, "model")
    assert "'x'" in problem.message


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b'{"body": {}}', b"\xff", b"\x00"])
def test_a_file_without_requests_says_so(plan: Planner, line: bytes) -> None:
    """With the line it first looked at."""
    with pytest.raises(Rejected) as rejected:
        plan(b"\n" + line + b"\n")
    assert (rejected.value.problem.code, rejected.value.problem.line) == ("invalid_json", 2)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n\t"])
def test_an_empty_file_is_rejected(plan: Planner, content: bytes) -> None:
    """Blank lines are no requests."""
    with pytest.raises(Rejected) as rejected:
        plan(content)
    assert (rejected.value.total, rejected.value.problem.code) == (0, "empty_file")


def test_brackets_a_thousand_deep_are_a_broken_line(plan: Planner) -> None:
    """Not the end of the planner."""
    deep = b'{"custom_id": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert plan(deep + b"\n" + request("a")).total == 2


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


# --- being stopped ----------------------------------------------------------------------------


def test_a_stopped_planner_leaves_no_plan_and_no_scratch(
    plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch may be planned again."""
    monkeypatch.setattr(planning, "_TICK_EVERY", 10)

    def stop() -> None:
        raise KeyboardInterrupt

    content = b"\n".join(request(str(number)) for number in range(50))
    with pytest.raises(KeyboardInterrupt):
        plan(content, keep_going=stop)
    assert not Manifest.exists(plan.batch)
    assert names(plan.batch) == []
    assert plan(content).total == 50
    assert names(plan.batch) == ["manifest"]


def test_what_a_killed_planner_left_is_cleared_away(plan: Planner) -> None:
    """Its hashes are worth nothing to another process."""
    (plan.batch / "planning-abc").mkdir()
    (plan.batch / "planning-abc" / "5").write_bytes(b"12345678")
    plan(b"\n".join(map(request, "ab")))
    assert names(plan.batch) == ["manifest"]
    assert plan.duplicates() == []


def test_a_batch_is_cut_once(plan: Planner) -> None:
    """A second planner, with other settings, finds the plan and leaves it."""
    content = b"\n".join(request(str(number)) for number in range(6))
    first = plan(content, chunk_items=2)
    chunks = plan.chunks()
    assert plan(content, chunk_items=3) == first
    assert plan.chunks() == chunks


def test_of_two_planners_at_once_the_first_wins(
    plan: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was paused in the middle and wakes late must not cut anew what is at work."""
    monkeypatch.setattr(planning, "_TICK_EVERY", 3)
    content = b"\n".join(request(str(number)) for number in range(6))
    quick: Iterator[Plan] = iter(())

    def overtake() -> None:
        nonlocal quick
        if not Manifest.exists(plan.batch):
            quick = iter([plan(content, chunk_items=1)])

    try:
        late = plan(content, chunk_items=5, keep_going=overtake)
    except Exception as error:  # noqa: BLE001 - the late one may also fail, and be tried again
        late = error  # type: ignore[assignment]
    assert next(quick).chunks == 6
    assert len(plan.chunks()) == 6
    assert not isinstance(late, Plan) or late.chunks == 6
