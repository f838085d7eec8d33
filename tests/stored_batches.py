"""Batches in stores without a node: recorded, planned and worked on step by step by the test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.files import FileRecord
from shared.jobs import Batch, BatchProblem, BatchState
from shared.leases import CONTROL_LANE, Lease, model_lane
from shared.shards import ShardHeader, shard_path, write_shard
from shared.stores import Stores
from tests.faults.batches import ENDPOINT, numbered
from workers.inference.control import run_control_unit
from workers.keeper import Keeper

MODEL = "echo"
LANE = model_lane(MODEL)


def upload(
    stores: Stores,
    content: bytes,
    *,
    owner: str = "ann",
    purpose: str = "batch",
    expires_after_s: int | None = None,
) -> FileRecord:
    """Store a file."""
    with stores.files.begin(
        owner=owner, filename="in.jsonl", purpose=purpose, expires_after_s=expires_after_s
    ) as writer:
        writer.write(content)
        return writer.commit()


def jsonl(lines: Iterable[str]) -> bytes:
    """The content of a file with these lines."""
    return "".join(f"{line}\n" for line in lines).encode()


def record(
    stores: Stores,
    content: bytes,
    *,
    owner: str = "ann",
    window: str = "24h",
    output_expires_after_s: int | None = None,
) -> Batch:
    """Record a batch of a file with this content; it waits to be planned."""
    return stores.batches.create(
        owner=owner,
        input_file=upload(stores, content, owner=owner),
        endpoint=ENDPOINT,
        completion_window=window,
        metadata=None,
        output_expires_after_s=output_expires_after_s,
    )


def link_model(stores: Stores) -> None:
    """Make the model known that the lines of :mod:`tests.faults.batches` name."""
    if MODEL not in {model.name for model in stores.models.list()}:
        stores.models.link(MODEL, None, engine="echo")


def run_control(stores: Stores, *, worker: str = "w", times: int = 1) -> None:
    """Plan or finalize what waits for it, ``times`` units."""
    keeper = Keeper(stores.leases, renew_s=5)
    for _ in range(times):
        lease = stores.leases.claim(CONTROL_LANE, worker)
        assert lease is not None, "nothing waits on the control lane"
        run_control_unit(lease, stores, keeper)


def planned(stores: Stores, items: int, *, owner: str = "ann", window: str = "24h") -> Batch:
    """A batch of so many good lines, planned: its chunks may be claimed."""
    link_model(stores)
    batch = record(stores, jsonl(numbered(items)), owner=owner, window=window)
    run_control(stores)
    found = now(stores, batch)
    assert found.state == BatchState.IN_PROGRESS
    return found


def now(stores: Stores, batch: Batch) -> Batch:
    """The batch as it is now."""
    return stores.batches.get(batch.owner, batch.id)


def claim(stores: Stores, worker: str = "w") -> Lease:
    """Claim a chunk, which must be there."""
    lease = stores.leases.claim(LANE, worker)
    assert lease is not None, "no chunk waits"
    return lease


def write(
    stores: Stores, lease: Lease, *, completed: int = 1, failed: int = 0, text: str = "out"
) -> ShardHeader:
    """Write the shard of a lease, with made-up lines."""
    output = f"{text} {lease.unit}\n".encode() * completed
    errors = f"err {lease.unit}\n".encode() * failed
    counts = {"failed:made_up": failed} if failed else {}
    header = ShardHeader(
        len(output), len(errors), completed, failed, 2 * completed, completed, counts=counts
    )
    folder = stores.batches.folder(lease.batch_id)
    write_shard(shard_path(folder, int(lease.unit), lease.token), header, output, errors)
    return header


def commit(
    stores: Stores,
    lease: Lease,
    *,
    completed: int = 1,
    failed: int = 0,
    problems: Sequence[BatchProblem] = (),
) -> bool:
    """Write the shard of a lease and commit it; says whether it was the last."""
    header = write(stores, lease, completed=completed, failed=failed)
    return stores.batches.committed(lease, header, problems)


def output_of(stores: Stores, batch: Batch, part: str = "output") -> bytes:
    """The bytes of a result file, empty if there is none."""
    file_id = batch.output_file_id if part == "output" else batch.error_file_id
    if file_id is None:
        return b""
    return stores.files.content_path(batch.owner, file_id).read_bytes()
