"""What a node sees of the GPUs that are lent to training; holders are real processes."""

from __future__ import annotations

import fcntl
from pathlib import Path

from tests.borrowed_gpus import borrowed, freed_for
from tests.running_node import wait_for
from workers.lending import Lending
from workers.training.gpulocks import free_file, lock_file

GPUS = ("0", "1", "GPU-5f2e/0")


def lending(run_dir: Path) -> Lending:
    """Of a node with three GPUs."""
    return Lending(run_dir, wait_s=10)


def test_without_a_lock_nothing_is_lent(tmp_path: Path) -> None:
    """A machine on which nobody ever trained."""
    seen = lending(tmp_path)
    seen.look(GPUS)
    seen.tell(GPUS, used=())
    assert seen.loans == {}
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_is_a_loan_until_its_holder_dies(tmp_path: Path) -> None:
    """By whatever; the reason names the GPU and the job."""
    seen = lending(tmp_path)
    with borrowed(tmp_path, "1", "GPU-5f2e/0", job="ftjob-a") as holder:
        seen.look(GPUS)
        assert set(seen.loans) == {"1", "GPU-5f2e/0"}
        assert seen.loans["1"].reason == "GPU 1 is lent to fine-tune ftjob-a"
        holder.kill()
        holder.wait()
        seen.look(GPUS)
        assert seen.loans == {}


def test_looking_does_not_keep_a_borrower_off(tmp_path: Path) -> None:
    """The lock is tried and let go at once."""
    lock_file(tmp_path, "0").parent.mkdir(parents=True)
    lock_file(tmp_path, "0").touch()
    seen = lending(tmp_path)
    seen.look(GPUS)
    with borrowed(tmp_path, "0", job="ftjob-a"):
        seen.look(GPUS)
        assert set(seen.loans) == {"0"}


def test_somebody_who_is_choosing_borrows_nothing(tmp_path: Path) -> None:
    """A lock that nobody has signed may be let go in a moment; engines do not leave for it."""
    seen = lending(tmp_path)
    with borrowed(tmp_path, "0", job="ftjob-a"):
        seen.look(GPUS)
        assert set(seen.loans) == {"0"}
    seen.look(GPUS)
    with open(lock_file(tmp_path, "0"), "ab") as choosing:
        fcntl.flock(choosing, fcntl.LOCK_EX)
        seen.look(GPUS)
        assert seen.loans == {}


def test_the_time_to_finish_runs_from_the_first_look(tmp_path: Path) -> None:
    """And anew for another borrower."""
    seen = lending(tmp_path)
    with borrowed(tmp_path, "0", job="ftjob-a"):
        seen.look(GPUS)
        first = seen.loans["0"]
        seen.look(GPUS)
        assert seen.loans["0"] == first
    with borrowed(tmp_path, "0", job="ftjob-b"):
        seen.look(GPUS)
        assert seen.loans["0"].until_s > first.until_s


def test_a_gpu_is_free_for_the_one_who_holds_its_lock(tmp_path: Path) -> None:
    """Not while an engine uses it, nor for the next borrower before that was looked at."""
    seen = lending(tmp_path)
    with borrowed(tmp_path, "0", "1", job="ftjob-a"):
        seen.look(GPUS)
        seen.tell(GPUS, used={"1"})
        assert (freed_for(tmp_path, "0"), freed_for(tmp_path, "1")) == ("ftjob-a", None)
    with borrowed(tmp_path, "0", job="ftjob-b"):
        assert freed_for(tmp_path, "0") is None, "its new holder took the old answer away"
        seen.look(GPUS)
        seen.tell(GPUS, used=())
        assert freed_for(tmp_path, "0") == "ftjob-b"


def test_what_was_said_of_a_returned_gpu_is_taken_back(tmp_path: Path) -> None:
    """Also if it was said by an earlier run of the node, or to somebody else."""
    free_file(tmp_path, "1").parent.mkdir(parents=True)
    free_file(tmp_path, "1").write_text("ftjob-old\n")
    seen = lending(tmp_path)
    with borrowed(tmp_path, "0", job="ftjob-a"):
        seen.look(GPUS)
        seen.tell(GPUS, used=())
        assert (freed_for(tmp_path, "0"), freed_for(tmp_path, "1")) == ("ftjob-a", None)
    wait_for(lambda: _returned(seen), "the lock to be let go", 10)
    seen.tell(GPUS, used=())
    assert freed_for(tmp_path, "0") is None


def _returned(seen: Lending) -> bool:
    seen.look(GPUS)
    return not seen.loans
