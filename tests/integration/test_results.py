"""A batch's lines by cursor, and batches of failed lines, step by step on real stores."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shared.errors import (
    EngineError,
    IllegalTransition,
    InvalidRequest,
    InvalidValue,
    NotFound,
    StorageFailed,
    VlmqError,
)
from shared.jobs import Batch, BatchState
from shared.leases import Lease
from shared.manifest import Manifest
from shared.results import ResultPage
from shared.shards import ShardHeader, shard_path, write_shard
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.batches import line, numbered
from tests.integration.api_server import running_api
from tests.stored_batches import claim, jsonl, link_model, now, planned, record, run_control
from workers.inference.batch_lines import error_line, item_id

CHUNK = 4


@pytest.fixture
def stores(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores that cut chunks of four lines."""
    settings = store_settings(
        redis_url, tmp_path, queue={"chunk_items": CHUNK, "min_chunk_items": CHUNK}
    )
    with connected(settings) as found:
        yield found


def answer(batch_id: str, number: int, text: str = "") -> bytes:
    """An output line as a worker writes it, but for its body."""
    name = item_id(batch_id, number)
    response = {"status_code": 200, "request_id": f"req_{name}", "body": {"text": text}}
    row = {"id": f"batch_req_{name}", "custom_id": "c", "response": response, "error": None}
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def write_lines(stores: Stores, lease: Lease, *, failing: int = 0, text: str = "") -> ShardHeader:
    """Write the shard of a lease; every ``failing``-th line of the input is an error."""
    folder = stores.batches.folder(lease.batch_id)
    chunk = Manifest(folder).chunk(int(lease.unit))
    outputs, errors = [], []
    for number in range(chunk.first_line, chunk.first_line + chunk.items):
        if failing and number % failing == 0:
            errors.append(error_line(item_id(lease.batch_id, number), "c", EngineError()))
        else:
            outputs.append(answer(lease.batch_id, number, text))
    output, failed = b"".join(outputs), b"".join(errors)
    header = ShardHeader(len(output), len(failed), len(outputs), len(errors), 0, 0)
    write_shard(shard_path(folder, chunk.index, lease.token), header, output, failed)
    return header


def do(stores: Stores, lease: Lease, *, failing: int = 0, text: str = "") -> None:
    """Write and commit."""
    stores.batches.committed(lease, write_lines(stores, lease, failing=failing, text=text), [])


def page(stores: Stores, batch: Batch, after: int = 0, limit: int = 1000) -> ResultPage:
    """A page of the batch's lines."""
    return stores.results.page(batch.owner, batch.id, after=after, limit=limit)


def numbers(found: ResultPage) -> list[int]:
    """The input lines that a page holds."""
    rows = b"".join(found.blocks()).splitlines()
    return [int(json.loads(row)["id"].rpartition("_")[2]) for row in rows]


def walk(stores: Stores, batch: Batch, *, limit: int, after: int = 0) -> tuple[list[int], int]:
    """Everything there is now, page by page, and the last cursor."""
    seen: list[int] = []
    while True:
        found = page(stores, batch, after, limit)
        got = numbers(found)
        assert len(got) <= limit
        seen += got
        after = found.next_after
        if not got:
            return seen, after


def finish(stores: Stores, *, failing: int = 0) -> None:
    """Work off what is left, and join."""
    while (lease := stores.leases.claim("model/echo", "w")) is not None:
        do(stores, lease, failing=failing)
    run_control(stores)


# --- reading while it runs --------------------------------------------------------------------


def test_lines_come_in_the_order_of_the_input_once_all_before_them_are_done(
    stores: Stores,
) -> None:
    """A chunk that is done early waits for the one before it; answers and errors are mixed."""
    batch = planned(stores, 3 * CHUNK)
    first, second, third = (claim(stores) for _ in range(3))
    do(stores, second, failing=3)
    found = page(stores, batch)
    assert (numbers(found), found.next_after, found.complete) == ([], 0, False)
    do(stores, first, failing=3)
    found = page(stores, batch)
    assert (numbers(found), found.next_after) == ([*range(1, 9)], 8)
    assert not found.complete
    do(stores, third)
    assert numbers(page(stores, batch, 8)) == [9, 10, 11, 12]
    assert not page(stores, batch, 12).complete, "it has not ended yet"


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 1000])
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_every_line_comes_once_whatever_the_page(stores: Stores, limit: int, failing: int) -> None:
    """While it runs and after it has ended, with the cursor got last."""
    batch = planned(stores, 22)
    do(stores, claim(stores), failing=failing)
    do(stores, claim(stores), failing=failing)
    early, after = walk(stores, batch, limit=limit)
    finish(stores, failing=failing)
    late, after = walk(stores, batch, limit=limit, after=after)
    assert early + late == [*range(1, 23)]
    assert page(stores, batch, after).complete
    assert walk(stores, batch, limit=limit)[0] == [*range(1, 23)]


def test_a_shard_whose_token_was_not_committed_is_not_seen(stores: Stores) -> None:
    """A worker that was paused past its lease writes beside, and changes nothing."""
    batch = planned(stores, CHUNK)
    late = claim(stores)
    stores.leases.reap(["w"])
    do(stores, claim(stores), text="the one that counts")
    write_lines(stores, late, text="too late")
    text = b"".join(page(stores, batch).blocks())
    assert text.count(b"the one that counts") == CHUNK
    assert b"too late" not in text


def test_a_page_that_was_begun_survives_the_end_of_the_batch(stores: Stores) -> None:
    """Shards vanish under it; the result files hold the same lines."""
    batch = planned(stores, 2 * CHUNK)
    do(stores, claim(stores), failing=3)
    do(stores, claim(stores), failing=3)
    expected = b"".join(page(stores, batch).blocks())
    begun = page(stores, batch)
    run_control(stores)
    assert not (stores.batches.folder(batch.id) / "shards").exists()
    assert b"".join(begun.blocks()) == expected == b"".join(page(stores, batch).blocks())


def test_a_cursor_holds_over_a_rebuild_and_a_chunk_done_again(stores: Stores) -> None:
    """In the middle of a chunk whose shard is then damaged, and which comes out differently."""
    batch = planned(stores, 3 * CHUNK)
    leases = [claim(stores) for _ in range(2)]
    for lease in leases:
        do(stores, lease, failing=2)
    found = page(stores, batch, 0, CHUNK + 2)
    assert numbers(found) == [1, 2, 3, 4, 5, 6]
    shard_path(stores.batches.folder(batch.id), 1, leases[1].token).write_bytes(b"")
    stores.redis.flushall()
    stores.rebuild()
    assert numbers(page(stores, batch, found.next_after)) == []
    finish(stores)
    assert walk(stores, batch, limit=3, after=found.next_after)[0] == [*range(7, 13)]
    stores.redis.flushall()
    stores.rebuild()
    last = page(stores, batch, found.next_after)
    assert (numbers(last), last.complete) == ([*range(7, 13)], True)


def test_lines_that_never_ran_come_where_they_were_in_the_input(stores: Stores) -> None:
    """Of a batch that was cancelled with a hole in its middle."""
    batch = planned(stores, 4 * CHUNK)
    leases = [claim(stores) for _ in range(3)]
    do(stores, leases[0])
    do(stores, leases[2])
    stores.batches.cancel(batch.owner, batch.id)
    stores.leases.reap(["w"])
    run_control(stores)
    assert now(stores, batch).state == BatchState.CANCELLED
    assert walk(stores, batch, limit=3)[0] == [*range(1, 17)]
    rows = b"".join(page(stores, batch).blocks()).splitlines()
    ran = [json.loads(row)["error"] is None for row in rows]
    assert ran == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4


def test_blank_lines_count_but_are_not_delivered(stores: Stores) -> None:
    """Also around the border of two chunks."""
    link_model(stores)
    texts = numbered(6)
    batch = record(stores, jsonl(["", *texts[:4], "", " ", *texts[4:], ""]))
    run_control(stores)
    while (lease := stores.leases.claim("model/echo", "w")) is not None:
        folder = stores.batches.folder(batch.id)
        chunk = Manifest(folder).chunk(int(lease.unit))
        rows = [answer(batch.id, chunk.first_line + step) for step in range(chunk.items)]
        output = b"".join(rows)
        header = ShardHeader(len(output), 0, len(rows), 0, 0, 0)
        write_shard(shard_path(folder, chunk.index, lease.token), header, output, b"")
        stores.batches.committed(lease, header, [])
    assert walk(stores, batch, limit=1)[0] == [2, 3, 4, 5, 8, 9]
    run_control(stores)
    assert walk(stores, batch, limit=4)[0] == [2, 3, 4, 5, 8, 9]


def test_a_batch_without_lines_is_complete_when_it_has_ended(stores: Stores) -> None:
    """One that failed as a whole, and one that was cancelled before it was planned."""
    link_model(stores)
    refused = record(stores, b"no json\n")
    assert not page(stores, refused).complete
    run_control(stores)
    stopped = record(stores, jsonl(numbered(2)))
    stores.batches.cancel(stopped.owner, stopped.id)
    run_control(stores)
    for batch in (refused, stopped):
        found = page(stores, batch)
        assert (numbers(found), found.next_after, found.complete) == ([], 0, True)


def test_a_cursor_past_the_end_is_refused(stores: Stores) -> None:
    """As soon as the end is known; before anything is planned at once."""
    link_model(stores)
    waiting = record(stores, jsonl(numbered(CHUNK)))
    with pytest.raises(InvalidValue, match="after") as caught:
        page(stores, waiting, 1)
    assert caught.value.param == "after"
    run_control(stores)
    finish(stores)
    assert page(stores, waiting, CHUNK).complete
    for after in (CHUNK + 1, 2**63 - 1):
        with pytest.raises(InvalidValue, match="after"):
            page(stores, waiting, after)


def test_somebody_elses_and_a_deleted_file_are_not_found(stores: Stores) -> None:
    """The second by its name."""
    batch = planned(stores, CHUNK)
    finish(stores)
    with pytest.raises(NotFound, match=batch.id):
        stores.results.page("bob", batch.id, after=0, limit=1)
    output = now(stores, batch).output_file_id
    assert output is not None
    stores.files.delete(batch.owner, output)
    with pytest.raises(NotFound, match="output_file_id"):
        b"".join(page(stores, batch).blocks())


def test_a_damaged_shard_is_an_error_not_an_answer(stores: Stores) -> None:
    """A shard whose bytes are not lines, and one cut short."""
    batch = planned(stores, CHUNK)
    lease = claim(stores)
    do(stores, lease)
    path = shard_path(stores.batches.folder(batch.id), 0, lease.token)
    good = path.read_bytes()
    for bad in (good.replace(b"batch_req_", b"batch_xxx_"), good[:-5]):
        path.write_bytes(bad)
        with pytest.raises(StorageFailed, match="damaged"):
            b"".join(page(stores, batch).blocks())


def test_memory_does_not_grow_with_what_is_read(stores: Stores) -> None:
    """32 MiB of lines pass through less than 4 MiB, from shards and from result files."""
    batch = planned(stores, 16 * CHUNK)
    for _ in range(16):
        do(stores, claim(stores), text="x" * (1 << 19))
    for ended in (False, True):
        if ended:
            run_control(stores)
        tracemalloc.start()
        size = sum(len(block) for block in page(stores, batch).blocks())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size > 32 << 20
        assert peak < 4 << 20


def test_reading_that_fails_half_way_shows_as_a_body_that_breaks_off() -> None:
    """What came before is whole lines, from whose number one can go on once it is repaired."""
    with running_api() as server, connected(server.settings) as stores:
        batch = planned(stores, 64, owner="local")
        leases = [claim(stores) for _ in range(3)]
        for lease in leases:
            do(stores, lease, text="x" * 10_000)
        path = shard_path(stores.batches.folder(batch.id), 2, leases[2].token)
        good = path.read_bytes()
        path.write_bytes(good.replace(b"batch_req_", b"batch_xxx_"))
        url = f"{server.base_url}/batches/{batch.id}/results"
        text = b""
        with (
            pytest.raises(httpx.RemoteProtocolError),
            httpx.stream("GET", url, params={"limit": 48}) as response,
        ):
            assert response.status_code == 200
            for block in response.iter_bytes():
                text += block
        *came, _ = text.split(b"\n")
        last = json.loads(came[-1])["id"].rpartition("_")[2]
        assert 0 < len(came) == int(last) < 48
        path.write_bytes(good)
        rest = httpx.get(url, params={"after": last, "limit": 48}).text.splitlines()
        seen = [json.loads(row)["id"] for row in (*came, *rest)]
        assert seen == [f"batch_req_{item_id(batch.id, number)}" for number in range(1, 49)]


# --- trying again what failed -----------------------------------------------------------------


def test_failed_lines_become_a_batch_of_their_own(stores: Stores) -> None:
    """As they were written, in their order, with the rest of the batch as it was."""
    link_model(stores)
    texts = numbered(10)
    content = b"\xef\xbb\xbf" + jsonl(texts).removesuffix(b"\n")
    batch = record(stores, content, window="7d", output_expires_after_s=7200)
    run_control(stores)
    while (lease := stores.leases.claim("model/echo", "w")) is not None:
        folder = stores.batches.folder(batch.id)
        chunk = Manifest(folder).chunk(int(lease.unit))
        outputs, errors = [], []
        for number in range(chunk.first_line, chunk.first_line + chunk.items):
            name = item_id(batch.id, number)
            if number in (1, 6, 10):
                errors.append(error_line(name, "c", EngineError()))
            else:
                outputs.append(answer(batch.id, number))
        output, failed = b"".join(outputs), b"".join(errors)
        header = ShardHeader(len(output), len(failed), len(outputs), len(errors), 0, 0)
        write_shard(shard_path(folder, chunk.index, lease.token), header, output, failed)
        stores.batches.committed(lease, header, [])
    run_control(stores)
    again = stores.retries.create(batch.owner, batch.id)
    assert (again.retry_of, again.completion_window) == (batch.id, "7d")
    assert (again.endpoint, again.output_expires_after_s) == (batch.endpoint, 7200)
    stored = stores.files.get(batch.owner, again.input_file_id)
    assert (stored.purpose, stored.filename) == ("batch", f"{batch.id}_retry.jsonl")
    copied = stores.files.content_path(batch.owner, stored.id).read_bytes()
    assert copied == b"\xef\xbb\xbf" + jsonl([texts[0], texts[5], texts[9]])
    run_control(stores)
    assert now(stores, again).total == 3
    stores.redis.flushall()
    stores.rebuild()
    assert now(stores, again).retry_of == batch.id


def test_lines_that_never_ran_and_lines_too_long_to_read_are_copied(
    redis_url: str, tmp_path: Path
) -> None:
    """In the input's order, however they are spread over the error file."""
    settings = store_settings(
        redis_url, tmp_path, queue={"chunk_items": 1, "max_line_bytes": 500_000}
    )
    with connected(settings) as stores:
        link_model(stores)
        long = line("long", "x" * 700_000)
        texts = [*numbered(2), long, *numbered(2)]
        batch = record(stores, jsonl(texts))
        run_control(stores)
        leases = [claim(stores) for _ in range(4)]
        do(stores, leases[0])
        do(stores, leases[3], failing=1)
        stores.batches.cancel(batch.owner, batch.id)
        stores.leases.reap(["w"])
        run_control(stores)
        again = stores.retries.create(batch.owner, batch.id)
        copied = stores.files.content_path(batch.owner, again.input_file_id).read_bytes()
        assert copied == jsonl(texts[1:])


def test_a_batch_that_cannot_be_retried_says_why(stores: Stores) -> None:
    """It runs, nothing failed, nothing could be run, it was never counted, its text is gone."""
    link_model(stores)
    running = planned(stores, CHUNK)
    _refused(stores, running, IllegalTransition, "in_progress")
    finish(stores)
    _refused(stores, running, InvalidRequest, "no line of the batch failed")
    rejected = record(stores, b"no json\n")
    run_control(stores)
    _refused(stores, rejected, InvalidRequest, "nothing of the batch could be run")
    stopped = record(stores, jsonl(numbered(2)))
    stores.batches.cancel(stopped.owner, stopped.id)
    run_control(stores)
    _refused(stores, stopped, InvalidRequest, stopped.input_file_id)
    failed = planned(stores, CHUNK)
    finish(stores, failing=1)
    error_file = now(stores, failed).error_file_id
    assert error_file is not None
    with pytest.raises(NotFound, match=failed.id):
        stores.retries.create("bob", failed.id)
    before = len(stores.files.list(failed.owner).items)
    stores.files.delete(failed.owner, error_file)
    _refused(stores, failed, NotFound, "error_file_id")
    stores.files.delete(failed.owner, failed.input_file_id)
    _refused(stores, failed, InvalidValue, "input file .* was deleted")
    assert len(stores.files.list(failed.owner).items) == before - 2, "nothing half-made is left"


def _refused(stores: Stores, batch: Batch, kind: type[VlmqError], words: str) -> None:
    with pytest.raises(kind, match=words):
        stores.retries.create(batch.owner, batch.id)
