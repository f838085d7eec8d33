"""One frozen tree of settings: from where, in which order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import ConfigurationError
from shared.settings import Settings, load_settings, snapshot, with_overrides


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file that people write."""
    path = tmp_path / "node.toml"
    path.write_text("[api]\nport = 1000\nthreads = 7\n[queue]\nchunk_items = 5\n")
    return path


def test_the_environment_wins_over_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field, and the file over the defaults."""
    monkeypatch.setenv("VLMQ_API__PORT", "2000")
    found = load_settings(toml)
    assert (found.api.port, found.api.threads, found.api.processes) == (2000, 7, 1)


def test_overrides_join_the_file(toml: Path) -> None:
    """Their fields win, the section's others stay."""
    found = load_settings(toml, api={"port": 3000})
    assert (found.api.port, found.api.threads) == (3000, 7)


def test_a_snapshot_is_complete(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that reads it back has the same tree, whatever its environment."""
    found = load_settings(toml)
    path = toml.with_suffix(".json")
    path.write_text(json.dumps(snapshot(found)))
    monkeypatch.setenv("VLMQ_API__PORT", "2000")
    again = load_settings(path)
    assert again.api == found.api
    assert (again.data_dir, again.run_dir) == (found.data_dir, found.run_dir)
    assert with_overrides(again, api={"port": 4000}).api.port == 4000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[api]\nprot = 1\n", "api.prot"),
        ("[apis]\n", "apis"),
        ("[api]\nport = 70000\n", "api.port"),
        ("[queue]\nrenew_s = 15\nlease_ttl_s = 20\n", "queue"),
        ("[queue]\nchunk_items = 0\n", "queue.chunk_items"),
        ('[node]\nroles = ["chef"]\n', "node.roles"),
        ('[redis]\npassword_file = "/run/secrets/password"\n', "redis: .*needs url"),
        (
            '[redis]\nurl = "redis://:word@host"\npassword_file = "/run/secrets/password"\n',
            "redis: .*not in both",
        ),
        ("[api\n", "TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    """With the file and the key."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=named) as refused:
        load_settings(path)
    assert "bad.toml" in refused.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """Not silently left out."""
    with pytest.raises(ConfigurationError, match="cannot read"):
        load_settings(tmp_path / "none.toml")


def test_settings_do_not_change() -> None:
    """They are passed around between threads."""
    found = Settings()
    with pytest.raises(ValidationError):
        found.api.port = 1


def test_each_data_folder_has_its_own_run_folder(tmp_path: Path) -> None:
    """Short enough for sockets, the same each time, and the Redis in it."""
    one, two = (
        load_settings(storage={"data_dir": str(tmp_path / name)}) for name in ("one", "two")
    )
    assert one.run_dir != two.run_dir
    assert one.run_dir == load_settings(storage={"data_dir": str(tmp_path / "one")}).run_dir
    assert len(str(one.run_dir)) < 60
    assert one.redis_url == f"unix://{one.run_dir}/redis.sock"
    elsewhere = load_settings(redis={"url": "redis://host:1"})
    assert elsewhere.redis_url == "redis://host:1"
