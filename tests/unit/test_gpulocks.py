"""GPUs under lock: all or none, until the last holder is gone, and not before engines have left."""

from __future__ import annotations

import subprocess
import sys
import threading
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
