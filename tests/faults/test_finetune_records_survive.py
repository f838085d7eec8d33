"""What holders of fine-tunes say while Redis is away, the disk is full, or they are killed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import LeaseLost, QueueUnavailable, StorageFull
from shared.finetune_folder import FinetuneFolder
from shared.finetune_store import NewEvent
from shared.finetunes import FinetuneCheckpoint, FinetuneState, Progress
from shared.settings import Settings, load_settings, snapshot
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.faults.test_storage_full import fill, small_disk
from tests.finetune_steps import claim, events, messages, now, queued, running
from tests.running_node import wait_for
from workers import redis_server

S = FinetuneState


class OwnValkey:
    """A Valkey of one test, that may be killed and started again."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.settings = settings
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with what it wrote down before."""
        with self._log.open("ab") as log:
            command = redis_server.command(self.settings)
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        socket = redis_server.socket_path(self.settings)
        wait_for(lambda: redis_server.answers(socket), "Valkey", 20)

    def kill(self) -> None:
        """End it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def valkey() -> Iterator[OwnValkey]:
    """One that runs."""
    with tempfile.TemporaryDirectory(prefix="vlmq-ft-") as name:
        storage = {"data_dir": f"{name}/data", "run_dir": f"{name}/run", "min_free_bytes": 0}
        settings = load_settings(storage=storage)
        settings.run_dir.mkdir(mode=0o700)
        redis_server.data_folder(settings).mkdir(mode=0o700, parents=True)
        found = OwnValkey(settings, Path(name) / "log")
        found.start()
        yield found
        found.kill()


def metrics(step: int) -> NewEvent:
    """A metrics event."""
    return NewEvent(f"Step {step}", type="metrics", data={"step": step})


def test_what_was_said_while_redis_was_away_reaches_it_with_the_next_word(
    valkey: OwnValkey,
) -> None:
    """Each event once, however often it was tried, and the lease is held on to."""
    with connected(valkey.settings) as stores:
        lease = running(stores)
        checkpoint = FinetuneCheckpoint(20, "work/20", 1)
        stores.finetunes.add_events(lease, [metrics(10)])
        valkey.kill()
        for _ in range(2):
            with pytest.raises(QueueUnavailable):
                stores.finetunes.add_events(lease, [metrics(10), metrics(20)])
        with pytest.raises(QueueUnavailable):
            stores.finetunes.note(lease, checkpoints=[checkpoint])
        with pytest.raises(QueueUnavailable):
            stores.finetunes.renew(lease)
        valkey.start()
        assert stores.finetunes.renew(lease) == "run"
        stores.finetunes.note(lease, progress=Progress(step=30))
        job = now(stores, lease.job)
        assert (job.progress.step, job.checkpoints) == (30, [checkpoint])
        assert [event.data["step"] for event in events(stores, job) if event.data] == [10, 20]
        kept, damaged = FinetuneFolder(stores.finetunes.path(job.id)).events()
        assert damaged == []
        assert [event.message for event in kept] == messages(stores, job)


def test_an_end_while_redis_is_away_may_be_said_until_it_is_heard(valkey: OwnValkey) -> None:
    """And is said once."""
    with connected(valkey.settings) as stores:
        lease = running(stores)
        valkey.kill()
        for _ in range(3):
            with pytest.raises(QueueUnavailable):
                stores.finetunes.move(lease, S.SUCCEEDED, message="Done", trained_tokens=5)
        valkey.start()
        for _ in range(2):
            stores.finetunes.move(lease, S.SUCCEEDED, message="Done", trained_tokens=5)
        job = now(stores, lease.job)
        assert (job.state, job.trained_tokens) == (S.SUCCEEDED, 5)
        assert messages(stores, job).count("Done") == 1


def test_an_end_while_redis_is_away_comes_with_the_next_word(valkey: OwnValkey) -> None:
    """A worker that gives up and lets go has said enough."""
    with connected(valkey.settings) as stores:
        lease = running(stores)
        valkey.kill()
        with pytest.raises(QueueUnavailable):
            stores.finetunes.move(lease, S.SUCCEEDED, message="Done")
        valkey.start()
        stores.finetunes.release(lease)
        job = now(stores, lease.job)
        assert job.state == S.SUCCEEDED
        assert messages(stores, job)[-1] == "Done"
        assert stores.finetunes.claim("train", "w", 1) is None


def test_who_lost_the_lease_while_redis_was_away_takes_back_what_it_wrote(
    valkey: OwnValkey,
) -> None:
    """A rebuild finds the next holder's word only."""
    with connected(valkey.settings) as stores:
        old = running(stores, worker="slow")
        valkey.kill()
        with pytest.raises(QueueUnavailable):
            stores.finetunes.add_events(old, [metrics(10)])
        with pytest.raises(QueueUnavailable):
            stores.finetunes.move(old, S.FAILED, message="Gave up")
        valkey.start()
        stores.finetunes.reap(["slow"])
        with pytest.raises(LeaseLost):
            stores.finetunes.note(old, stage="register")
        recorded = stores.finetunes.recorded(old.job_id)
        assert recorded is not None
        assert (recorded.state, recorded.stage) == (S.QUEUED, "train")
        new = claim(stores)
        stores.finetunes.add_events(new, [metrics(20)])
        told = messages(stores, new.job)
        assert told.count("Step 20") == 1
        assert "Step 10" not in told
        stores.redis.flushall()
        stores.rebuild()
        assert messages(stores, new.job) == told


@pytest.fixture
def full_disk(redis_url: str, tmp_path: Path) -> Iterator[Stores]:
    """Stores whose fine-tunes are on a disk of 1 MiB."""
    with contextlib.ExitStack() as stack:
        settings = store_settings(redis_url, tmp_path)
        folder = settings.data_dir / "finetunes"
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(small_disk(folder, 1))
        yield stack.enter_context(connected(settings))


def test_a_full_disk_leaves_what_was_there_and_with_room_it_goes_on(full_disk: Stores) -> None:
    """No half line, no half record; and Redis says nothing that the disk does not."""
    stores = full_disk
    lease = running(stores)
    stores.finetunes.note(lease, progress=Progress(step=1))
    stores.finetunes.add_events(lease, [metrics(1)])
    before, told = now(stores, lease.job), events(stores, lease.job)
    ballast = fill(stores.layout.finetunes)
    many = [NewEvent("x" * 900, type="metrics", data={"step": step}) for step in range(2, 40)]
    for say in (
        lambda: stores.finetunes.add_events(lease, many),
        lambda: stores.finetunes.note(lease, progress=Progress(step=2)),
        lambda: stores.finetunes.move(lease, S.FAILED, message="No"),
        lambda: stores.finetunes.want("ann", lease.job_id, "pause"),
        lambda: queued(stores),
    ):
        with pytest.raises(StorageFull):
            say()
    assert now(stores, lease.job) == before
    assert events(stores, lease.job) == told
    assert stores.finetunes.renew(lease) == "run"
    stores.finetunes.release(lease, waiting_for="space on the disk", message="No room")
    given_back = now(stores, lease.job)
    assert (given_back.state, given_back.waiting_for) == (S.QUEUED, "space on the disk")
    with pytest.raises(StorageFull):
        stores.finetunes.claim("train", "w", 1)
    assert now(stores, lease.job).attempts == 0
    ballast.unlink()
    stores.redis.delete(f"vlmq:finetune:{lease.job_id}:delays")
    lease = claim(stores)
    assert lease.job.progress.step == 1
    stores.finetunes.move(lease, S.RUNNING, message="Again")
    stores.finetunes.add_events(lease, many)
    stores.finetunes.move(lease, S.FAILED, message="Yes")
    kept, damaged = FinetuneFolder(stores.finetunes.path(lease.job_id)).events()
    assert damaged == []
    told = [text for text in messages(stores, lease.job) if text != "No room"]
    assert [event.message for event in kept] == told
    assert [path.name for path in stores.layout.finetunes.glob("ftjob-*")] == [lease.job_id]


HOLDER = """
import sys
from pathlib import Path
from shared.finetune_store import NewEvent
from shared.finetunes import Progress
from shared.settings import load_settings
from shared.stores import Stores

stores = Stores.connect(load_settings(Path(sys.argv[1])))
lease = stores.finetunes.claim("train", "holder", 1)
step = lease.job.progress.step
while True:
    step += 1
    event = NewEvent(f"Step {step}", type="metrics", data={"step": step})
    stores.finetunes.add_events(lease, [event])
    stores.finetunes.note(lease, progress=Progress(step=step))
    print(step, flush=True)
"""


def test_kill_9_of_a_holder_at_any_moment_loses_no_word(redis_url: str, tmp_path: Path) -> None:
    """What it was told had arrived is there; the next one goes on from it; nothing is damaged."""
    settings = store_settings(redis_url, tmp_path)
    config = tmp_path / "settings.json"
    config.write_text(json.dumps(snapshot(settings)))
    with connected(settings) as stores:
        job = queued(stores)
        done = 0
        for _ in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(config)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            for _ in range(10):
                done = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.communicate()[0].split()
            done = int(rest[-1]) if rest else done
            stores.finetunes.reap(["holder"])
            assert now(stores, job).progress.step in (done, done + 1)
        claim(stores)  # brings what only the disk has heard
        found = [event.data["step"] for event in events(stores, job) if event.data]
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= done
        told, before = messages(stores, job), now(stores, job)
        stores.redis.flushall()
        assert stores.rebuild().damaged == []
        # Redis has heard late what the dead had only written down; the disk has all of it by time.
        assert sorted(messages(stores, job)) == sorted(told)
        assert now(stores, job).progress == before.progress
        assert before.attempts == 4
