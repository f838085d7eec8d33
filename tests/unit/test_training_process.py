"""Processes of a trainer without training: one per GPU, what they get, how they end together."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from workers.inference.tiny import CHECKPOINT
from workers.training.orders import TrainerJob
from workers.training.saved import seal
from workers.training.trainer import provide_base, require_fit, train_arguments

# In a process of its own: handlers of signals belong to a main thread.
RUN = "import sys; from workers.training import ranks; sys.exit(ranks.run(sys.argv[2:], int(sys.argv[1])))"


def run_ranks(count: int, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(count), sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_each_process_knows_its_place_and_the_common_port(tmp_path: Path) -> None:
    code = (
        "import os; n = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT');"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write("
        "' '.join(os.environ[i] for i in n))"
    )
    assert run_ranks(2, code).returncode == 0
    first, second = ((tmp_path / name).read_text().split() for name in ("0", "1"))
    assert first[:4] == ["0", "0", "2", "127.0.0.1"]
    assert second[:4] == ["1", "1", "2", "127.0.0.1"]
    assert first[4] == second[4] != "29500"


def test_the_status_is_that_of_the_one_that_failed() -> None:
    code = "import os, sys; sys.exit(66 if os.environ['RANK'] == '1' else 0)"
    assert run_ranks(2, code).returncode == 66


def test_one_that_was_killed_ends_the_others() -> None:
    code = (
        "import os, time; r = os.environ['RANK'];"
        "os.kill(os.getpid(), 9) if r == '1' else time.sleep(600)"
    )
    command = RUN.replace("sys.exit", "ranks.GRACE_S = 0.2; sys.exit")
    shown = subprocess.run(
        [sys.executable, "-c", command, "2", sys.executable, "-c", code], timeout=60, check=False
    )
    assert shown.returncode == 128 + 9


def test_two_jobs_on_one_machine_have_ports_of_their_own() -> None:
    """DeepSpeed's own is fixed, so the second job would fail."""
    code = (
        "import os; from workers.training import surroundings as s; s.single_process_group();"
        "print(os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])"
    )
    shown = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(4)
    ]
    pairs = [one.stdout.split() for one in shown]
    assert {size for size, _ in pairs} == {"1"}
    assert "29500" not in {port for _, port in pairs}
    assert len({port for _, port in pairs}) > 1


def test_a_left_out_library_says_so_when_it_is_used() -> None:
    code = (
        "from workers.training import surroundings; surroundings._leave_out('datasets');"
        "from datasets import Dataset; import datasets; Dataset(1)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "Dataset was left out to start faster" in shown.stderr


def test_what_train_py_is_given() -> None:
    job = TrainerJob(config="c", work_dir="w", deepspeed="d", base="b", model_path="b", seed=3)
    plain = ["c", "--work-dir", "w", "--deepspeed", "d"]
    assert train_arguments(job, on_gpus=False) == [*plain, "--seed", "3"]
    more = TrainerJob(
        config="c",
        work_dir="w",
        deepspeed="d",
        base="b",
        model_path="b",
        seed=3,
        gpus=2,
        resume="r",
    )
    wanted = [*plain, "--launcher", "pytorch", "--resume", "r"]
    assert train_arguments(more, on_gpus=True) == wanted


def test_a_base_without_code_gets_a_copy_that_has_it(tmp_path: Path) -> None:
    copy = tmp_path / "base"
    provide_base(CHECKPOINT, copy)
    assert (copy / "modeling_internvl_chat.py").is_file()
    assert (copy / "model.safetensors").is_symlink()
    written = (copy / "config.json").stat().st_mtime_ns
    time.sleep(0.01)
    provide_base(CHECKPOINT, copy)
    assert (copy / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert "auto_map" not in (CHECKPOINT / "config.json").read_text()


def test_only_a_whole_checkpoint_of_as_many_processes_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "iter_4.pth"
    folder.mkdir()
    (folder / "rank_0_optim_states.pt").write_bytes(b"o")
    with pytest.raises(SystemExit, match="not whole"):
        require_fit(folder, 1)
    seal(folder, iteration=4, step=2, created_at=1, loss=1.0)
    require_fit(folder, 1)
    with pytest.raises(SystemExit, match="as many as before"):
        require_fit(folder, 2)
