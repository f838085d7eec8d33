"""GPUs under lock: all or none, until the last holder is gone, and not before engines have left.

And fair: whoever has waited for a while comes before those that ask later.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import LeaseLost
from tests.running_node import wait_for
from workers.training.gpulocks import GpuLocks, LentGpus, Taken, free_file, lock_file


def locks(run_dir: Path, *gpus: str, served: tuple[str, ...] = ()) -> GpuLocks:
    """The locks of a machine with ``gpus``."""
    return GpuLocks(run_dir, gpus, served=lambda: served)


def taken(found: LentGpus | Taken) -> LentGpus:
    """What was taken; fails the test if nothing was."""
    assert isinstance(found, LentGpus), found
    return found


def go_on() -> None:
    """Nothing asks to stop."""


def test_all_or_none(tmp_path: Path) -> None:
    """Given one of three GPUs taken, when three are asked for, then none is, and two can be had."""
    machine = locks(tmp_path, "0", "1", "2")
    first = taken(machine.take(1, "ftjob-a"))
    refused = machine.take(3, "ftjob-b")
    assert isinstance(refused, Taken)
    assert refused.words == "GPU 0 is used by ftjob-a"
    assert machine.holders() == {"0": "ftjob-a"}
    both = taken(machine.take(2, "ftjob-c"))
    assert (both.visible, machine.holders()["2"]) == ("1,2", "ftjob-c")
    first.close()
    both.close()
    assert machine.holders() == {}


def test_gpus_without_engines_are_chosen_first(tmp_path: Path) -> None:
    """Given GPU 0 in use by engines, when one is asked for, then it is another."""
    lent = taken(locks(tmp_path, "0", "1", served=("0",)).take(1, "ftjob-a"))
    assert lent.gpus == ("1",)


def test_no_gpus_need_no_lock(tmp_path: Path) -> None:
    """Given a machine without GPUs, when none is asked for, then nothing is locked and hidden."""
    assert taken(locks(tmp_path).take(0, "ftjob-a")).visible == ""


def test_many_who_want_overlapping_gpus_all_get_their_turn(tmp_path: Path) -> None:
    """Given jobs of 1, 2 and 3 GPUs at once on three, when each retries, then all come through."""
    machine, ended, held = locks(tmp_path, "0", "1", "2"), [], threading.Semaphore(3)

    def work(count: int) -> None:
        def attempt() -> bool:
            found = machine.take(count, f"ftjob-{count}")
            if isinstance(found, Taken):
                return False
            assert all(held.acquire(blocking=False) for _ in range(count))
            held.release(count)
            found.close()
            return True

        wait_for(attempt, f"{count} GPUs", 30)
        ended.append(count)

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3, 3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    assert sorted(ended) == [1, 1, 2, 2, 3, 3]


def test_a_lock_lasts_as_long_as_the_process_that_took_it_over(tmp_path: Path) -> None:
    """Given a child with the lock, when we close ours, the GPU is taken until the child is dead."""
    machine = locks(tmp_path, "GPU-8f:1/2")
    lent = taken(machine.take(1, "ftjob-a"))
    [lock] = lent.locks
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),)
    )
    lent.close()
    assert machine.holders() == {"GPU-8f:1/2": "ftjob-a"}
    child.kill()
    child.wait()
    assert machine.holders() == {}


def test_training_waits_until_the_engines_have_left(tmp_path: Path) -> None:
    """Given engines on a locked GPU, when the fleet says that they are gone, then it is free."""
    machine = locks(tmp_path, "0", "1", served=("0", "1"))
    lent = taken(machine.take(2, "ftjob-a"))
    assert machine.wait_until_free(lent, wait_s=0.3, keep_going=go_on) == ["0", "1"]
    free_file(tmp_path, "0").write_text("ftjob-a\n")
    assert machine.wait_until_free(lent, wait_s=0.3, keep_going=go_on) == ["1"]
    free_file(tmp_path, "1").write_text("ftjob-a\n")
    assert machine.wait_until_free(lent, wait_s=0.3, keep_going=go_on) == []


def test_what_was_said_to_an_earlier_holder_does_not_count(tmp_path: Path) -> None:
    """Given a word of the fleet from last time, when the GPU is taken again, then it is gone."""
    machine = locks(tmp_path, "0", served=("0",))
    lock_file(tmp_path, "0").parent.mkdir()
    free_file(tmp_path, "0").write_text("ftjob-a\n")
    lent = taken(machine.take(1, "ftjob-b"))
    assert machine.wait_until_free(lent, wait_s=0.3, keep_going=go_on) == ["0"]
    free_file(tmp_path, "0").write_text("ftjob-a\n")  # the fleet had not looked again
    assert machine.wait_until_free(lent, wait_s=0.3, keep_going=go_on) == ["0"]


def test_waiting_ends_when_the_job_is_stopped(tmp_path: Path) -> None:
    """Given engines that do not leave, when the lease is lost, then the waiting ends at once."""

    def stop() -> None:
        raise LeaseLost()

    machine = locks(tmp_path, "0", served=("0",))
    with pytest.raises(LeaseLost):
        machine.wait_until_free(taken(machine.take(1, "ftjob-a")), wait_s=60, keep_going=stop)


# --- whose turn it is -------------------------------------------------------------------------

_SMALL_JOBS = """
import sys, time
from pathlib import Path
from workers.training.gpulocks import GpuLocks, LentGpus
machine = GpuLocks(Path(sys.argv[1]), ("0", "1"), served=tuple, patience_s=0.2)
running, number = [], 0
while True:
    found = machine.take(1, f"ftjob-small-{number}")
    if isinstance(found, LentGpus):
        running.append(found)
        number += 1
        print(number, flush=True)
    may_not = not isinstance(found, LentGpus) and found.ahead
    if len(running) == 2 or (running and may_not):
        # A job ends only when the next one runs, or may not: left alone both GPUs are never free.
        running.pop(0).close()
    time.sleep(0.02)
"""

_WAITING_JOB = """
import sys, time
from pathlib import Path
from workers.training.gpulocks import GpuLocks
machine = GpuLocks(Path(sys.argv[1]), ("0", "1"), served=tuple)
while True:
    print(machine.take(2, "ftjob-dies"), flush=True)
    time.sleep(0.05)
"""


@contextlib.contextmanager
def running(program: str, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has said its first word; killed at the end of the block."""
    command = [sys.executable, "-c", program, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline()
            yield child
        finally:
            child.kill()


def fair(run_dir: Path, *, patience_s: float = 0.0, heard_s: float = 60.0) -> GpuLocks:
    """The locks of a machine with two GPUs, on which a turn comes after ``patience_s``."""
    return GpuLocks(run_dir, ("0", "1"), served=tuple, patience_s=patience_s, heard_s=heard_s)


def ahead(found: LentGpus | Taken) -> str | None:
    """For whom GPUs were kept."""
    assert isinstance(found, Taken), found
    return found.ahead


def test_a_stream_of_small_jobs_does_not_starve_one_that_wants_several(tmp_path: Path) -> None:
    """Given small jobs that overlap in another process, when two GPUs are wanted, they come free."""
    machine = fair(tmp_path, patience_s=0.2)
    with running(_SMALL_JOBS, tmp_path) as small:
        got: list[LentGpus] = []

        def attempt() -> bool:
            found = machine.take(2, "ftjob-large")
            got.extend([found] if isinstance(found, LentGpus) else [])
            return bool(got)

        wait_for(attempt, "two GPUs", 20)
        assert machine.holders() == {"0": "ftjob-large", "1": "ftjob-large"}
        got[0].close()
        assert small.stdout is not None
        wait_for(lambda: "small" in str(machine.holders()), "small jobs to go on", 20)


def test_for_a_while_free_gpus_are_used_all_the_same(tmp_path: Path) -> None:
    """Given a job that has just begun to wait, when a small one fits beside it, then it runs."""
    machine = fair(tmp_path, patience_s=3600)
    first = taken(machine.take(1, "ftjob-a"))
    assert ahead(machine.take(2, "ftjob-large")) is None
    second = taken(machine.take(1, "ftjob-b"))
    first.close()
    second.close()


def test_who_waits_longest_is_next_and_gets_all_at_once(tmp_path: Path) -> None:
    """Given two that wait, then the earlier one goes first, however often the other asks."""
    machine = fair(tmp_path)
    small = taken(machine.take(1, "ftjob-small"))
    assert ahead(machine.take(2, "ftjob-z-first")) is None
    time.sleep(0.01)  # times are kept in milliseconds
    assert ahead(machine.take(2, "ftjob-a-second")) == "ftjob-z-first"
    refused = machine.take(1, "ftjob-third")
    assert isinstance(refused, Taken)
    assert refused.words == "ftjob-z-first, which has waited longer, comes first"
    assert machine.holders() == {"0": "ftjob-small"}
    small.close()
    assert ahead(machine.take(2, "ftjob-a-second")) == "ftjob-z-first"
    both = taken(machine.take(2, "ftjob-z-first"))
    both.close()
    assert ahead(machine.take(1, "ftjob-third")) == "ftjob-a-second"
    taken(machine.take(2, "ftjob-a-second")).close()
    taken(machine.take(1, "ftjob-third")).close()
    assert not list((tmp_path / "lent").glob("*.waiting"))


def test_a_waiting_job_that_dies_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Given kill -9 of whoever waited, when nothing is heard of it, then its turn has passed."""
    machine = fair(tmp_path, heard_s=1.0)
    small = taken(machine.take(1, "ftjob-small"))
    with running(_WAITING_JOB, tmp_path):
        assert ahead(machine.take(1, "ftjob-next")) == "ftjob-dies"
    wait_for(lambda: isinstance(machine.take(1, "ftjob-next"), LentGpus), "the dead one's turn", 20)
    small.close()


def test_a_job_that_was_not_heard_of_has_its_place_again(tmp_path: Path) -> None:
    """Given a worker without room to ask for it, when it asks again, then it is not the last."""
    machine = fair(tmp_path)
    small = taken(machine.take(1, "ftjob-small"))
    machine.take(2, "ftjob-large")
    an_hour_ago = time.time() - 3600
    [ticket] = (tmp_path / "lent").glob("*.waiting")
    os.utime(ticket, (an_hour_ago, an_hour_ago))
    taken(machine.take(1, "ftjob-b")).close()
    time.sleep(0.01)
    assert ahead(machine.take(2, "ftjob-late")) is None
    machine.take(2, "ftjob-large")
    assert ahead(machine.take(2, "ftjob-late")) == "ftjob-large"
    os.utime(ticket, (0, 0))
    assert ahead(machine.take(2, "ftjob-late")) is None
    assert not ticket.exists()  # after a week it is forgotten
    small.close()


def test_who_wants_more_than_there_are_keeps_nothing(tmp_path: Path) -> None:
    """Given a job that can never have its GPUs here, then the others go on."""
    machine = fair(tmp_path)
    assert ahead(machine.take(3, "ftjob-huge")) is None
    taken(machine.take(2, "ftjob-a")).close()
