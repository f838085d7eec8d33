"""What a node keeps on disk: locks, logs, the private folder; and what it finds in /proc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from workers.locks import exclusive
from workers.logfiles import log_path, open_log, readable, rotate, tail
from workers.node import make_private
from workers.strays import MARK, end_strays, find_strays


def test_a_lock_is_refused_to_the_second_who_asks(tmp_path: Path) -> None:
    """Given a held lock, when asked for again, then the refusal names the holder."""
    with (
        exclusive(tmp_path / "lock", "busy"),
        pytest.raises(ConfigurationError, match=rf"busy \(process {os.getpid()}\)"),
    ):
        exclusive(tmp_path / "lock", "busy")
    exclusive(tmp_path / "lock", "busy").close()


def test_a_lock_is_held_by_a_child_that_inherits_it(tmp_path: Path) -> None:
    """Given a child with the descriptor, when the parent lets go, then the lock stays held."""
    lock = exclusive(tmp_path / "lock", "busy")
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    lock.close()
    with pytest.raises(ConfigurationError):
        exclusive(tmp_path / "lock", "busy")
    child.communicate(b"\n")
    exclusive(tmp_path / "lock", "busy").close()


def test_a_large_log_is_moved_aside_under_a_writer(tmp_path: Path) -> None:
    """Given an open log that has grown, when rotated, then the writer goes on in a short file."""
    path = tmp_path / "x.log"
    with open_log(path) as log:
        log.write(b"old\n" * 100)
        log.flush()
        assert rotate(path, max_bytes=200)
        log.write(b"new\n")
    assert path.read_bytes() == b"new\n"
    assert (tmp_path / "x.log.1").read_bytes() == b"old\n" * 100


def test_a_tail_holds_only_what_came_since_the_start(tmp_path: Path) -> None:
    """Given lines of an earlier run, when the tail is read from this run's start, they are out."""
    path = tmp_path / "x.log"
    path.write_text("earlier\n")
    start = path.stat().st_size
    with open_log(path) as log:
        log.write(b"one\n\ntwo\nthree\n")
    assert tail(path, 2, since=start) == ["two", "three"]
    assert tail(path, 9, since=start) == ["one", "two", "three"]
    assert tail(tmp_path / "none.log", 2) == []


def test_a_log_that_cannot_be_copied_aside_stays_as_it_is(tmp_path: Path) -> None:
    """A full disk, say: the node that looks after the log goes on."""
    path = tmp_path / "a.log"
    path.write_bytes(b"x" * 100)
    (tmp_path / "a.log.1").mkdir()
    assert not rotate(path, max_bytes=50)
    assert path.read_bytes() == b"x" * 100


def test_json_log_lines_are_told_in_words() -> None:
    """A structured line becomes one a person can read; any other stays as it is."""
    line = json.dumps(
        {"event": "setup failed", "level": "error", "model": "m", "exception": "a\nKeyError: 'x'"}
    )
    assert readable(line) == "error: setup failed model=m (KeyError: 'x')"
    assert readable("plain text") == "plain text"
    assert readable("[1, 2]") == "[1, 2]"


def test_names_become_safe_file_names(tmp_path: Path) -> None:
    """A program named after any model stays in its folder."""
    assert log_path(tmp_path, "engine ft:a/../../b/0") == tmp_path / "engine-ft-a-..-..-b-0.log"


def test_the_run_dir_is_for_this_user_only(tmp_path: Path) -> None:
    """A new run_dir has mode 700, an old one gets it, and a link to elsewhere is refused."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigurationError, match="not a folder of yours"):
        make_private(tmp_path / "link")


def test_strays_are_found_by_their_mark_and_ended(tmp_path: Path) -> None:
    """Given a marked and an unmarked process, when strays are ended, only the marked one is."""
    command = [sys.executable, "-c", "print(flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    marked = subprocess.Popen(command, env={**os.environ, MARK: str(tmp_path)}, **pipes)
    other = subprocess.Popen(command, env={**os.environ, MARK: f"{tmp_path}x"}, **pipes)
    try:
        for process in (marked, other):
            assert process.stdout is not None
            process.stdout.readline()
        assert find_strays(tmp_path) == [marked.pid]
        assert end_strays(tmp_path, wait_s=0.2) == [marked.pid]
        assert marked.wait(timeout=10) == -9
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.communicate()
