"""A trainer under its supervisor: whoever is killed, nothing of it stays and its end is told.

The trainers here are small scripts that behave as badly as real ones do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.process import parent_of
from tests.running_node import wait_for
from workers.strays import end_strays, find_strays
from workers.training.gpulocks import GpuLocks, LentGpus
from workers.training.process import JOB_MARK, Ending, TrainingProcess, end_earlier

LIMIT_S = 20.0

POLITE = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("checkpoint").write_text("whole")
    sys.exit(64)
signal.signal(signal.SIGTERM, save)
pathlib.Path("up").touch()
while True:
    time.sleep(0.05)
"""
DEAF = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("up").touch()
time.sleep(600)
"""
PARENT_OF_MANY = """
import pathlib, subprocess, sys, time
rank = "import time; time.sleep(600)"
runaway = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", rank])
subprocess.Popen([sys.executable, "-c", rank], start_new_session=True)
subprocess.run([sys.executable, "-c", runaway])
pathlib.Path("up").touch()
if "leave" in sys.argv:
    sys.exit(3)
time.sleep(600)
"""
"""A rank in its group, one in a session of its own, and one whose parent is gone as well."""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[str]:
    """A job's id of this test alone; whatever is left of it fails the test and is ended."""
    job_id = f"ftjob-{os.getpid()}-{tmp_path.name}"
    yield job_id
    assert end_strays(job_id, JOB_MARK) == []


def start(folder: Path, job: str, script: str, *words: str, **options: float) -> TrainingProcess:
    """Run ``script`` supervised in ``folder``, and wait until it is up."""
    process = launch(folder, job, script, *words, **options)
    wait_for((folder / "up").exists, "the script", LIMIT_S, lambda: log_of(folder))
    return process


def launch(folder: Path, job: str, script: str, *words: str, **options: float) -> TrainingProcess:
    """Run ``script`` supervised in ``folder``."""
    (folder / "script.py").write_text(f"import os\nos.chdir({str(folder)!r})\n{script}")
    return TrainingProcess(
        (sys.executable, str(folder / "script.py"), *words),
        name=job,
        run_dir=folder,
        log=folder / "log",
        stop_s=options.get("stop_s", LIMIT_S),
        environment={},
    )


def ending(process: TrainingProcess, folder: Path) -> Ending:
    """Wait for its end."""
    wait_for(process.ended, "the end", LIMIT_S, lambda: log_of(folder))
    return process.status()


def log_of(folder: Path) -> str:
    """What the script said."""
    return (folder / "log").read_text()


def trainer_of(process: TrainingProcess, job: str) -> int:
    """The supervisor's own child."""
    children = [pid for pid in find_strays(job, JOB_MARK) if parent_of(pid) == process.pid]
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    [trainer] = [pid for pid, command in commands.items() if b"script.py" in command]
    return trainer


def test_an_exit_status_is_told(tmp_path: Path, job: str) -> None:
    """Given a trainer that fails, when it has ended, then its status and its words are known."""
    process = launch(tmp_path, job, "import sys; print('no such image', flush=True); sys.exit(7)")
    assert ending(process, tmp_path) == Ending(7, "exit 7")
    assert log_of(tmp_path) == "no such image\n"


def test_a_command_that_cannot_be_started_is_told(tmp_path: Path, job: str) -> None:
    """Given no such interpreter, when started, then the log names it."""
    process = TrainingProcess(
        ("/no/such/python",),
        name=job,
        run_dir=tmp_path,
        log=tmp_path / "log",
        stop_s=1,
        environment={},
    )
    assert ending(process, tmp_path).status == 1
    assert "/no/such/python" in log_of(tmp_path)


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path, job: str) -> None:
    """Given no folder for the log, when started, then the end names it."""
    process = TrainingProcess(
        (sys.executable, "-c", ""),
        name=job,
        run_dir=tmp_path,
        log=tmp_path / "nowhere" / "log",
        stop_s=1,
        environment={},
    )
    wait_for(process.ended, "the end", LIMIT_S)
    assert "nowhere/log: No such file" in process.status().words


def test_a_trainer_asked_to_stop_saves_first(tmp_path: Path, job: str) -> None:
    """Given a trainer that saves on SIGTERM, when asked to stop, then it has time to."""
    process = start(tmp_path, job, POLITE)
    process.stop()
    assert ending(process, tmp_path).status == 64
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_a_trainer_that_does_not_stop_is_killed(tmp_path: Path, job: str) -> None:
    """Given one that ignores SIGTERM, when its time is over, then it is killed."""
    process = start(tmp_path, job, DEAF, stop_s=0.5)
    process.stop()
    assert ending(process, tmp_path) == Ending(-9, "killed by SIGKILL")


def test_a_trainer_can_be_killed_at_once(tmp_path: Path, job: str) -> None:
    """Given a long time for stopping, when it is to be killed, then none of it passes."""
    process = start(tmp_path, job, DEAF, stop_s=600)
    process.stop()
    process.kill()
    assert ending(process, tmp_path).status == -9


def test_a_paused_trainer_still_stops(tmp_path: Path, job: str) -> None:
    """Given a trainer under SIGSTOP, when asked to stop, then it is woken for it."""
    process = start(tmp_path, job, POLITE)
    os.kill(trainer_of(process, job), signal.SIGSTOP)
    process.stop()
    assert ending(process, tmp_path).status == 64


def test_a_supervisor_that_does_not_obey_is_killed(
    tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a supervisor under SIGSTOP, when its time is over, then it and its trainer are gone."""
    monkeypatch.setattr("workers.training.process.SUPERVISOR_GRACE_S", 0.5)
    process = start(tmp_path, job, PARENT_OF_MANY, stop_s=0.1)
    os.kill(process.pid, signal.SIGSTOP)
    process.stop()
    assert ending(process, tmp_path).status is None


@pytest.mark.parametrize("victim", ["nobody", "trainer", "supervisor"])
def test_nothing_of_a_trainer_is_left(tmp_path: Path, job: str, victim: str) -> None:
    """Given ranks in groups and sessions of their own, when either dies, then all are gone."""
    words = ["leave"] if victim == "nobody" else []
    process = start(tmp_path, job, PARENT_OF_MANY, *words)
    if victim == "trainer":
        os.kill(trainer_of(process, job), signal.SIGKILL)
    elif victim == "supervisor":
        os.kill(process.pid, signal.SIGKILL)
    end = ending(process, tmp_path)
    assert end.status == {"nobody": 3, "trainer": -9, "supervisor": None}[victim]
    assert find_strays(job, JOB_MARK) == []


CONSUMER = """
import sys, time
from pathlib import Path
from workers.training.process import TrainingProcess
folder, job = Path(sys.argv[1]), sys.argv[2]
TrainingProcess((sys.executable, str(folder / "script.py")), name=job, run_dir=folder,
    log=folder / "log", stop_s=20, environment={})
time.sleep(600)
"""


@pytest.fixture
def consumer(tmp_path: Path, job: str) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that runs a script supervised, as a consumer does."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(script: str) -> subprocess.Popen[bytes]:
        path = tmp_path / "script.py"
        path.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{script}")
        started.append(subprocess.Popen([sys.executable, "-c", CONSUMER, str(tmp_path), job]))
        wait_for((tmp_path / "up").exists, "the script", LIMIT_S)
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_when_its_consumer_is_killed_a_trainer_saves_and_ends(
    tmp_path: Path, job: str, consumer: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Given kill -9 of the consumer, then the trainer is stopped as for a pause."""
    consumer(POLITE).kill()
    wait_for(lambda: find_strays(job, JOB_MARK) == [], "every process to end", LIMIT_S)
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_a_later_attempt_waits_until_the_earlier_has_saved(
    tmp_path: Path, job: str, consumer: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Given a consumer paused past its lease, when another begins, then the trainer saves first."""
    os.kill(consumer(POLITE).pid, signal.SIGSTOP)
    assert end_earlier(job, wait_s=LIMIT_S) == []
    assert (tmp_path / "checkpoint").read_text() == "whole"


def test_an_attempt_that_was_overtaken_leaves_the_next_one_alone(tmp_path: Path, job: str) -> None:
    """Given a worker that slept past its lease, when it sweeps, then the job's next trainer lives."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    overtaken = start(folders[0], job, POLITE)
    assert end_earlier(job, wait_s=LIMIT_S) == []
    following = start(folders[1], job, POLITE)
    assert ending(overtaken, folders[0]).status == 64
    assert not following.ended()
    following.stop()
    assert ending(following, folders[1]).status == 64


def test_a_later_attempt_does_not_wait_for_ever(
    job: str, consumer: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Given an earlier trainer that does not stop, when the time is over, then all is killed."""
    os.kill(consumer(DEAF).pid, signal.SIGSTOP)
    assert len(end_earlier(job, wait_s=0.5)) == 2


def test_two_trainers_at_once_have_ports_of_their_own(tmp_path: Path, job: str) -> None:
    """Given two jobs on one host, then DeepSpeed's port is not the same."""
    listening = textwrap.dedent("""
        import os, pathlib, socket
        port = socket.create_server((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        print(port.getsockname()[1], flush=True)
    """)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    running = [start(folder, f"{job}-{folder.name}", listening + POLITE) for folder in folders]
    for process, folder in zip(running, folders, strict=True):
        process.stop()
        assert ending(process, folder).status == 64
    assert len({log_of(folder) for folder in folders}) == 2


def test_gpus_stay_locked_until_nothing_of_the_trainer_is_left(tmp_path: Path, job: str) -> None:
    """Given a supervisor with locks, when its trainer is up, they are held, and afterwards not."""
    machine = GpuLocks(tmp_path, ("0", "1"), served=tuple)
    lent = machine.take(2, job)
    assert isinstance(lent, LentGpus)
    (tmp_path / "script.py").write_text("import time; time.sleep(600)")
    process = TrainingProcess(
        (sys.executable, str(tmp_path / "script.py")),
        name=job,
        run_dir=tmp_path,
        log=tmp_path / "log",
        stop_s=5,
        environment={"CUDA_VISIBLE_DEVICES": lent.visible},
        hold=lent.locks,
    )
    assert machine.holders() == {"0": job, "1": job}
    process.kill()
    assert ending(process, tmp_path).status == -9
    assert machine.holders() == {}
