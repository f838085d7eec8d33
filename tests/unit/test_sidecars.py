"""Sidecars on a real disk: whose a file is, hostile names, whole files, two exports at once."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from cli.export.names import Names, caption_name
from cli.export.sidecars import SidecarWriter
from cli.export.writing import LeftOut, Report
from cli.export.written import FOLDER
from shared.result_rows import ResultRow
from tests.faults.test_storage_full import small_disk


def row(line: int, name: str | None, text: str = "", *, image: str | None = None) -> ResultRow:
    return ResultRow(
        line=line,
        custom_id=name,
        image=image,
        prompt=None,
        caption=text or f"caption {line}",
        model="echo",
        finish_reason="stop",
        prompt_tokens=1,
        completion_tokens=1,
        error_code=None,
        error=None,
    )


def write(
    root: Path, rows: Sequence[ResultRow], *, overwrite: bool = False, is_set: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Write them; what became of files, and why rows were left out."""
    report = Report(io.BytesIO())
    writer = SidecarWriter(root, Names(is_set=is_set), report, overwrite=overwrite)
    try:
        for one in rows:
            try:
                writer.add(one)
            except LeftOut as error:
                report.leave_out(one, error)
        writer.close()
    finally:
        writer.abandon()
    return dict(writer.fates), dict(report.left_out)


def texts(root: Path) -> dict[str, str]:
    """Every text below a folder."""
    return {
        str(path.relative_to(root)): path.read_text()
        for path in root.rglob("*.txt")
        if FOLDER not in path.parts
    }


# --- whose a file is --------------------------------------------------------------------------


def test_captions_are_written_and_written_anew(tmp_path: Path) -> None:
    """A second export replaces what the first wrote, and leaves alone what is as it should be."""
    assert write(tmp_path, [row(1, "a.jpg"), row(2, "b/c.png")]) == ({"new": 2}, {})
    assert texts(tmp_path) == {"a.txt": "caption 1", "b/c.txt": "caption 2"}
    again = [row(1, "a.jpg"), row(2, "b/c.png", "better"), row(3, "d.jpg")]
    assert write(tmp_path, again) == ({"same": 1, "replaced": 1, "new": 1}, {})
    assert texts(tmp_path) == {"a.txt": "caption 1", "b/c.txt": "better", "d.txt": "caption 3"}


def test_a_persons_own_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    """And stays theirs in later exports."""
    (tmp_path / "a.txt").write_text("mine")
    for _ in range(2):
        assert write(tmp_path, [row(1, "a.jpg")]) == ({}, {"not_overwritten": 1})
        assert texts(tmp_path) == {"a.txt": "mine"}
    assert write(tmp_path, [row(1, "a.jpg")], overwrite=True) == ({"replaced": 1}, {})
    assert write(tmp_path, [row(1, "a.jpg", "new")]) == ({"replaced": 1}, {})


def test_a_caption_that_a_person_changed_is_theirs(tmp_path: Path) -> None:
    write(tmp_path, [row(1, "a.jpg")])
    (tmp_path / "a.txt").write_text("corrected by hand")
    assert write(tmp_path, [row(1, "a.jpg", "new")]) == ({}, {"not_overwritten": 1})
    assert texts(tmp_path) == {"a.txt": "corrected by hand"}


def test_a_file_that_says_the_same_does_not_become_ours(tmp_path: Path) -> None:
    """Somebody wrote the very caption; another caption must not replace it."""
    (tmp_path / "a.txt").write_text("caption 1")
    assert write(tmp_path, [row(1, "a.jpg")]) == ({"same": 1}, {})
    assert write(tmp_path, [row(1, "a.jpg", "other")]) == ({}, {"not_overwritten": 1})


def test_a_caption_that_was_deleted_is_written_anew(tmp_path: Path) -> None:
    write(tmp_path, [row(1, "a.jpg")])
    (tmp_path / "a.txt").unlink()
    assert write(tmp_path, [row(1, "a.jpg")]) == ({"new": 1}, {})


def test_links_folders_and_pipes_are_not_written_through(tmp_path: Path) -> None:
    """Nothing outside is touched, with or without --overwrite."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.txt").symlink_to(outside / "a.txt")
    (root / "dangling.txt").symlink_to(outside / "new.txt")
    (root / "linked").symlink_to(outside)
    (root / "folder.txt").mkdir()
    (root / "file").write_text("no folder")
    os.mkfifo(root / "pipe.txt")
    rows = [
        row(1, "link.jpg"),
        row(2, "dangling.jpg"),
        row(3, "linked/a.jpg"),
        row(4, "folder.jpg"),
        row(5, "file/a.jpg"),
        row(6, "pipe.jpg"),
    ]
    assert write(root, rows) == ({}, {"not_overwritten": 4, "unusable_name": 2})
    assert write(root, rows, overwrite=True) == ({"replaced": 3}, {"unusable_name": 3})
    assert texts(outside) == {"a.txt": "outside"}
    assert (root / "link.txt").read_text() == "caption 1"
    assert not (root / "link.txt").is_symlink()


# --- names ------------------------------------------------------------------------------------


def test_two_lines_that_mean_one_file_are_told(tmp_path: Path) -> None:
    """The first has it, in one group and in the next."""
    rows = [row(1, "a.jpg"), row(2, "a.png"), *(row(n, f"{n}.jpg") for n in range(3, 700))]
    fates, left_out = write(tmp_path, [*rows, row(700, "a.webp")])
    assert (fates, left_out) == ({"new": 698}, {"name_taken": 2})
    assert texts(tmp_path)["a.txt"] == "caption 1"


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "a/../../b.jpg",
        "/etc/a.jpg",
        "a//b.jpg",
        "./a.jpg",
        "a/",
        "",
        "a\0b.jpg",
        "x" * 252 + ".raw",
        "/".join(["d"] * 300),
        f"{FOLDER}/written.jpg",
    ],
)
def test_a_name_that_leads_out_or_nowhere_is_left_out(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    assert write(root, [row(1, name)]) == ({}, {"unusable_name": 1})
    assert texts(tmp_path) == {}


def test_a_line_without_a_name_is_left_out(tmp_path: Path) -> None:
    assert write(tmp_path, [row(1, None)]) == ({}, {"no_name": 1})


def test_a_path_inside_the_folder_counts_before_the_custom_id(tmp_path: Path) -> None:
    """As an absolute path or as a URL; one outside of it does not."""
    rows = [
        row(1, "x", image=f"{tmp_path}/a/1.jpg"),
        row(2, "y", image=f"file://{tmp_path}/a/b%20c.jpg"),
        row(3, "z", image="/elsewhere/3.jpg"),
        row(4, "w", image=f"{tmp_path}/../4.jpg"),
    ]
    assert write(tmp_path, rows) == ({"new": 3}, {"unusable_name": 1})
    assert set(texts(tmp_path)) == {"a/1.txt", "a/b c.txt", "z.txt"}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"a.jpg", b"a.txt"),
        (b"a.JPEG", b"a.txt"),
        (b"a.b.png", b"a.b.txt"),
        (b"item-1", b"item-1.txt"),
        (b"v1.2", b"v1.2.txt"),
        (b".jpg", b".jpg.txt"),
        (b"\xff.webp", b"\xff.txt"),
    ],
)
def test_what_a_sidecar_is_called(image: bytes, expected: bytes) -> None:
    assert caption_name(image) == expected


def test_names_of_a_set_are_unescaped(tmp_path: Path) -> None:
    """Bytes that are no text come back as they were; elsewhere a backslash is a backslash."""
    write(tmp_path, [row(1, r"bad\xff.jpg"), row(2, r"b\x5cx41.jpg")], is_set=True)
    assert sorted(os.listdir(os.fsencode(tmp_path)))[1:] == [b"b\\x41.txt", b"bad\xff.txt"]
    write(tmp_path / "b", [row(1, r"bad\xff.jpg")])
    assert set(texts(tmp_path / "b")) == {r"bad\xff.txt"}


# --- trouble ----------------------------------------------------------------------------------


def test_two_exports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    """The second is refused while the first is at work."""
    first = SidecarWriter(tmp_path, Names(is_set=False), Report(None), overwrite=False)
    with pytest.raises(click.ClickException, match="another export writes below"):
        SidecarWriter(tmp_path, Names(is_set=False), Report(None), overwrite=False)
    first.abandon()
    assert write(tmp_path, [row(1, "a.jpg")]) == ({"new": 1}, {})


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, [row(1, "a.jpg")])
    (tmp_path / FOLDER / "written.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(click.ClickException, match="delete it"):
        write(tmp_path, [row(1, "a.jpg")])


_KILLED = """
import sys
from pathlib import Path
from tests.unit.test_sidecars import row, write
print("begun", flush=True)
write(Path(sys.argv[1]), [row(n, f"{n % 7}/{n}.jpg", sys.argv[2] + str(n)) for n in range(5_000)])
"""


@pytest.mark.parametrize("after", [200, 1_300])
def test_kill_9_leaves_whole_files_and_the_next_export_knows_them(
    tmp_path: Path, after: int
) -> None:
    """Killed while it replaces its own files: none is half, none is taken for somebody else's."""
    write(tmp_path, [row(n, f"{n % 7}/{n}.jpg", f"old {n}") for n in range(1_600)])
    command = [sys.executable, "-c", _KILLED, str(tmp_path), "new "]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE)
    marker = tmp_path / str(after % 7) / f"{after}.txt"
    assert process.stdout is not None
    process.stdout.readline()
    while marker.read_text() == f"old {after}":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = texts(tmp_path)
    for name, text in found.items():
        number = Path(name).stem
        assert text in {f"old {number}", f"new {number}"}
    assert f"old {1_599}" in found.values()
    fates, left_out = write(
        tmp_path, [row(n, f"{n % 7}/{n}.jpg", f"new {n}") for n in range(1_600)]
    )
    assert left_out == {}
    assert sum(fates.values()) == 1_600
    assert set(texts(tmp_path).values()) == {f"new {n}" for n in range(1_600)}
    assert not list(tmp_path.rglob("*.part"))


def test_a_full_disk_stops_it_and_what_is_written_is_whole(tmp_path: Path) -> None:
    """With room it goes on."""
    root = tmp_path / "small"
    root.mkdir()
    rows = [row(n, f"{n}.jpg", f"{n} " + "x" * 3_000) for n in range(1_500)]
    with small_disk(root, 3):
        with pytest.raises(click.ClickException, match="No space left"):
            write(root, rows)
        found = texts(root)
        assert all(text == f"{Path(name).stem} " + "x" * 3_000 for name, text in found.items())
        subprocess.run(["mount", "-o", "remount,size=32m", str(root)], check=True)
        fates, left_out = write(root, rows)
        assert left_out == {}
        assert fates == {"same": len(found), "new": len(rows) - len(found)}


def test_a_folder_on_another_disk_is_written_to(tmp_path: Path) -> None:
    """Where no file can be moved to from the record's own disk; unasked nothing is replaced there."""
    mounted = tmp_path / "sub"
    mounted.mkdir()
    with small_disk(mounted, 4):
        (mounted / "mine.txt").write_text("mine")
        rows = [row(1, "sub/a.jpg"), row(2, "sub/b/c.jpg"), row(3, "sub/mine.jpg")]
        assert write(tmp_path, rows) == ({"new": 2}, {"not_overwritten": 1})
        again = [row(1, "sub/a.jpg", "better"), *rows[1:]]
        assert write(tmp_path, again) == ({"replaced": 1, "same": 1}, {"not_overwritten": 1})
        assert texts(mounted) == {"a.txt": "better", "b/c.txt": "caption 2", "mine.txt": "mine"}
