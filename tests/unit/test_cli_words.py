"""The command line without a server: usage, exit statuses, local commands, reading values."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli import main
from cli.commands.batch import counts
from cli.commands.chat import content, image_url
from cli.commands.models import read_defaults
from cli.commands.node import _serve
from cli.options import pairs, read_settings
from tests.checkpoints import write_checkpoint


def run(*arguments: str) -> int:
    """Run the command line in this process; returns the exit status."""
    return main.run(arguments)


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing argument, an unknown command and an unknown option are usage errors."""
    assert run("batch", "submit") == 2
    assert run("fly") == 2
    assert run("status", "--fast") == 2
    assert "No such option" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """``vlmq --help`` exits with 0 and lists what there is."""
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in ("up", "worker", "chat", "batch", "models", "status", "keys", "doctor"):
        assert f"\n  {name} " in text


def test_no_server_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Given nobody at the address, then the exit status is 1 and the advice is to start one."""
    assert run("batch", "list", "--url", "http://127.0.0.1:9") == 1
    assert "is 'vlmq up' running?" in capsys.readouterr().err


def test_an_address_that_is_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Given a URL without its scheme, then the message says what is wrong with it."""
    assert run("batch", "list", "--url", "server:8000") == 1
    assert "starts with http://" in capsys.readouterr().err


def test_a_wrong_configuration_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given an unknown key in the file, then its name is said and the exit status is 1."""
    config = tmp_path / "node.toml"
    config.write_text("[nodes]\n")
    assert run("keys", "list", "--config", str(config)) == 1
    assert "nodes" in capsys.readouterr().err


def test_models_are_linked_listed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a checkpoint, when it is linked, it is listed with its terms; removed, it is not."""
    place = ("--data-dir", str(tmp_path / "data"))
    folder = write_checkpoint(tmp_path / "model")
    terms = ("--trust-remote-code", "--default", "temperature=0", "--default", "top_k=5")
    assert run("models", "link", "mine", str(folder), *terms, *place) == 0
    capsys.readouterr()
    assert run("models", "list", "--json", *place) == 0
    [record] = json.loads(capsys.readouterr().out)
    assert (record["name"], record["path"]) == ("mine", str(folder))
    assert record["trust_remote_code"] is True
    assert (record["defaults"]["temperature"], record["defaults"]["top_k"]) == (0, 5)
    assert run("models", "link", "mine", str(folder), *place) == 1
    assert run("models", "link", "mine", str(folder), "--replace", *place) == 0
    assert run("models", "remove", "mine", *place) == 0
    assert run("models", "remove", "mine", *place) == 1
    assert folder.is_dir()


@pytest.mark.parametrize("wrong", ["temperature=hot", "colour=1", "temperature"])
def test_a_wrong_default_is_refused(wrong: str) -> None:
    """An unknown parameter, a wrong type and a missing value are usage errors."""
    with pytest.raises(click.BadParameter):
        read_defaults((wrong,))


def test_keys_are_shown_once_and_never_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a new key, then its secret is printed, and neither it nor its digest is listed."""
    place = ("--data-dir", str(tmp_path / "data"))
    assert run("keys", "create", "ann", "--name", "laptop", *place) == 0
    said = capsys.readouterr()
    secret = said.out.strip()
    assert secret.startswith("vlmq-")
    assert "every request needs a key" in said.err
    assert run("keys", "list", "--json", *place) == 0
    listed = capsys.readouterr().out
    [record] = json.loads(listed)
    assert record["owner"] == "ann"
    assert secret not in listed
    assert "digest" not in record
    assert run("keys", "revoke", record["id"], *place) == 0
    assert run("keys", "revoke", record["id"], *place) == 1


def test_doctor_finds_a_checkpoint_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a linked folder that was deleted, then doctor names it and exits with 1."""
    place = ("--data-dir", str(tmp_path / "data"))
    folder = write_checkpoint(tmp_path / "model")
    assert run("models", "link", "mine", str(folder), *place) == 0
    (folder / "config.json").unlink()
    assert run("doctor", "--json", *place) == 1
    findings = json.loads(capsys.readouterr().out)
    broken = {f["check"]: f["message"] for f in findings if f["verdict"] == "problem"}
    assert broken.keys() == {"redis", "models"}
    assert str(folder) in broken["models"]


def test_local_images_travel_as_data_urls(tmp_path: Path) -> None:
    """A file becomes a data: URL with its type; URLs and file ids stay as they are."""
    path = tmp_path / "a.png"
    path.write_bytes(b"pixels")
    assert image_url(str(path)) == f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"
    for place in ("https://example.org/a.jpg", "file-123", "data:image/png;base64,AA=="):
        assert image_url(place) == place
    with pytest.raises(click.BadParameter, match="No such file"):
        image_url(str(tmp_path / "none.png"))


def test_a_message_holds_its_images_before_its_text() -> None:
    """Without images a message is plain text, with images it has parts."""
    assert content("hi", []) == "hi"
    parts = content("hi", ["file-1"])
    assert [part["type"] for part in parts if isinstance(part, dict)] == ["image_url", "text"]


def test_an_engine_needs_a_model_unless_it_is_echo() -> None:
    """``--engine echo`` alone serves a model of that name; another engine must be told which."""
    assert _serve("echo", None) == {"serve": [{"model": "echo", "engine": "echo"}]}
    assert _serve(None, "m") == {"serve": [{"model": "m"}]}
    assert _serve(None, None) == {}
    with pytest.raises(click.UsageError):
        _serve("lmdeploy", None)


def test_the_sockets_follow_the_data_dir(tmp_path: Path) -> None:
    """Two data folders have two run folders, so their nodes do not meet."""
    first = read_settings(None, tmp_path / "a")
    second = read_settings(None, tmp_path / "b")
    assert first.data_dir == tmp_path / "a"
    assert first.run_dir != second.run_dir


def test_pairs_are_read_and_checked() -> None:
    """Values may hold equals signs; a name without a value is refused."""
    assert pairs(("a=1", "b=x=y", "c=")) == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(click.BadParameter):
        pairs(("a",))


def test_counts_mention_failures_only_if_there_are_any() -> None:
    """``2/5`` and ``2/5 (1 failed)``."""
    numbers = {"completed": 2, "failed": 0, "total": 5}
    assert counts({"request_counts": numbers}) == "2/5"
    assert counts({"request_counts": {**numbers, "failed": 1}}) == "2/5 (1 failed)"


def test_the_command_line_starts_without_heavy_imports() -> None:
    """Importing it brings in neither Celery nor Flask nor torch."""
    code = (
        "import cli.main, sys; "
        "print([m for m in ('celery', 'flask', 'torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"
