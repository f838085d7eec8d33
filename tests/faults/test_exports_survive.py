"""Exports through kill -9, a full disk and a server that goes away: whole files or none."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared.jobs import Batch
from shared.stores import Stores
from tests.conftest import connected
from tests.datasets import jpeg
from tests.exports import Exporter, answered, asking, json_lines
from tests.faults.test_storage_full import small_disk
from tests.integration.api_server import ApiServer, running_api
from tests.running_node import wait_for

COUNT = 6_000
FORMS = ("jsonl", "parquet", "llava", "openai", "webdataset")


def long_caption(number: int) -> str:
    """One that fills pages, so that an export has a middle; nothing packs it well."""
    return f"{number} " + hashlib.shake_256(str(number).encode()).hexdigest(1_000)


@pytest.fixture(scope="module")
def api() -> Iterator[ApiServer]:
    with running_api() as server:
        yield server


@pytest.fixture(scope="module")
def stores(api: ApiServer) -> Iterator[Stores]:
    with connected(api.settings) as found:
        yield found


@pytest.fixture(scope="module")
def batch(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """Some megabytes of captions of one image."""
    image = tmp_path_factory.mktemp("images") / "1.jpg"
    image.write_bytes(jpeg(1))
    lines = [asking(f"{n}", str(image)) for n in range(1, COUNT + 1)]
    return answered(stores, lines, long_caption)


def exporting(
    api: ApiServer, batch: Batch, form: str, target: Path, *more: str
) -> subprocess.Popen[str]:
    """``vlmq batch export`` as a process of its own."""
    command = [sys.executable, "-m", "cli.main", "batch", "export", batch.id, "--format", form]
    command += ["-o", str(target), "--url", f"http://127.0.0.1:{api.port}", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def size_of(folder: Path) -> int:
    """Bytes of what is being made in it."""
    return sum(path.stat().st_size for path in folder.glob(".*.part/*"))


@pytest.mark.parametrize("form", ["jsonl", "webdataset", "parquet"])
def test_kill_9_leaves_nothing_under_the_name_and_the_next_export_cleans_up(
    form: str, api: ApiServer, batch: Batch, tmp_path: Path
) -> None:
    process = exporting(api, batch, form, tmp_path / "out")
    wait_for(lambda: size_of(tmp_path) > 100_000, "the middle of the export", 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    again = exporting(api, batch, form, tmp_path / "out")
    assert again.communicate(timeout=100)[1].startswith(f"{COUNT:,} rows")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_leaves_nothing(api: ApiServer, batch: Batch, tmp_path: Path) -> None:
    process = exporting(api, batch, "jsonl", tmp_path / "out")
    wait_for(lambda: size_of(tmp_path) > 100_000, "the middle of the export", 60)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_what_was_there(
    form: str, api: ApiServer, batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said in words, and nothing half: the earlier file stays, and with room it is replaced."""
    folder = tmp_path / "disk"
    folder.mkdir()
    export = Exporter(f"http://127.0.0.1:{api.port}")
    with small_disk(folder, 2):
        (folder / "out").write_text("earlier")
        assert export(batch, form, folder / "out", "--overwrite") == 1
        assert "No space left on device" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert (folder / "out").read_text() == "earlier"
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert export(batch, form, folder / "out", "--overwrite") == 0
        assert (folder / "out").stat().st_size > 2 << 20


def test_an_export_outlives_the_server(api: ApiServer, batch: Batch, tmp_path: Path) -> None:
    """Killed and started again in the middle of a page: every row is there once."""
    target = tmp_path / "out"
    process = exporting(api, batch, "jsonl", target)
    wait_for(lambda: size_of(tmp_path) > 100_000, "the middle of the export", 60)
    assert api.process is not None
    port = api.port
    os.kill(api.process.pid, signal.SIGKILL)
    api.process.wait()
    restart(api, port)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert [row["line"] for row in json_lines(target)] == list(range(1, COUNT + 1))


def restart(api: ApiServer, port: int) -> None:
    """The same API on the same port."""
    config = api.config.read_text()
    api.config.write_text(config.replace("port = 0", f"port = {port}"))
    api.start()


def test_two_exports_to_one_name_do_not_mix(
    api: ApiServer, batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    process = exporting(api, batch, "parquet", target)
    wait_for((tmp_path / ".out.part").exists, "the export", 60)
    export = Exporter(f"http://127.0.0.1:{api.port}")
    assert export(batch, "jsonl", target) == 1
    assert "another export writes" in capsys.readouterr().err
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert pq.read_metadata(target).num_rows == COUNT


# --- memory -----------------------------------------------------------------------------------

_MEASURED = """
import re, sys
from pathlib import Path
from cli.main import run
status = run(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""
"""Not by what the kernel tells of a child: that counts the parent that it was forked from."""


@pytest.fixture(scope="module")
def sizes(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """Two batches, the second with four times the rows."""
    image = tmp_path_factory.mktemp("images") / "1.jpg"
    image.write_bytes(jpeg(1))
    asked = [asking(f"{n}", str(image)) for n in range(24_000)]
    return [answered(stores, asked[:6_000]), answered(stores, asked)]


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_batch(
    form: str, api: ApiServer, sizes: list[Batch], tmp_path: Path
) -> None:
    """Four times the rows, the same peak, within a few megabytes."""
    peaks = []
    for batch in sizes:
        command = [sys.executable, "-c", _MEASURED, "batch", "export", batch.id, "--format", form]
        command += ["-o", str(tmp_path / batch.id), "--url", f"http://127.0.0.1:{api.port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8_000, peaks
