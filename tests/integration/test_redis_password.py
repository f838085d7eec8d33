"""A Valkey with a password: the file that holds it serves both clients, and shows nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.connection import connect, server_of
from shared.errors import ConfigurationError, QueueUnavailable
from shared.queue import CONTROL_QUEUE
from shared.settings import Settings, load_settings, snapshot
from tests.conftest import connected
from tests.locked_valkey import PASSWORD, LockedValkey


def settings_for(valkey: LockedValkey, folder: Path, url: str = "") -> Settings:
    """Settings of a program beside ``valkey``."""
    return load_settings(
        storage={"data_dir": str(folder / "data"), "min_free_bytes": 0},
        redis={"url": url or valkey.url, "password_file": str(valkey.password_file)},
    )


def test_both_clients_use_the_password(locked_valkey: LockedValkey, tmp_path: Path) -> None:
    """The stores' commands and Celery's messages arrive."""
    with connected(settings_for(locked_valkey, tmp_path)) as stores:
        stores.redis.flushall()
        stores.tickets.control()
        assert stores.tickets.waiting(CONTROL_QUEUE) == 1


def test_a_name_in_the_url_is_sent_along(locked_valkey: LockedValkey, tmp_path: Path) -> None:
    """A user of an access list has a name too, and only what the list allows."""
    with connected(settings_for(locked_valkey, tmp_path)) as stores:
        rules = ("+@all", "-flushall", "~vlmq:*", "&*", f">{PASSWORD}", "on")
        stores.redis.execute_command("ACL", "SETUSER", "vl/mq", *rules)
    named = locked_valkey.database(1).replace("redis://", "redis://vl%2Fmq@")
    with connected(settings_for(locked_valkey, tmp_path, named)) as stores:
        stores.tickets.control()
        users = [client["user"] for client in stores.redis.client_list() if client["db"] == "1"]
        assert len(users) > 1, "the stores' connection and Celery's"
        assert set(users) == {"vl/mq"}


def test_without_the_password_nothing_is_answered(
    locked_valkey: LockedValkey, tmp_path: Path
) -> None:
    """And the failure says that it is about access."""
    for redis in ({"url": locked_valkey.url}, {"url": locked_valkey.url_with("wrong")}):
        client = connect(load_settings(storage={"data_dir": str(tmp_path)}, redis=redis))
        with pytest.raises(QueueUnavailable, match="password"):
            client.ping()
        client.close()


def test_a_changed_password_counts_from_the_next_connection(
    locked_valkey: LockedValkey, tmp_path: Path
) -> None:
    """Given a running program, when password and file change, then it goes on after a cut."""
    own_file = tmp_path / "password"
    own_file.write_text(PASSWORD)
    settings = load_settings(
        storage={"data_dir": str(tmp_path / "data"), "min_free_bytes": 0},
        # A database of its own, for Celery keeps one pool per URL in a process.
        redis={"url": locked_valkey.database(2), "password_file": str(own_file)},
    )
    with connected(settings) as stores:
        stores.tickets.control()
        stores.redis.config_set("requirepass", "another")
        try:
            own_file.write_text("another\n")
            stores.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            stores.redis.connection_pool.disconnect()
            stores.tickets.control()
            assert stores.redis.ping()
        finally:
            stores.redis.config_set("requirepass", PASSWORD)


def test_the_password_is_in_no_setting(locked_valkey: LockedValkey, tmp_path: Path) -> None:
    """Neither the snapshot, nor what the libraries would print, holds it."""
    settings = settings_for(locked_valkey, tmp_path)
    assert PASSWORD not in json.dumps(snapshot(settings))
    with connected(settings) as stores:
        stores.redis.ping()
        shown = (
            repr(settings),
            stores.celery.conf.humanize(with_defaults=True),
            stores.celery.connection().as_uri(include_password=True),
            repr(stores.redis.connection_pool),
        )
    assert PASSWORD not in "".join(shown)


@pytest.mark.parametrize(
    ("url", "bare", "credentials"),
    [
        ("redis://host:1/0", "redis://host:1/0", ("word",)),
        ("rediss://ann@host:1/0?a=b", "rediss://host:1/0?a=b", ("ann", "word")),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1", ("word",)),
        ("unix://ann@/run/redis.sock", "unix:///run/redis.sock", ("ann", "word")),
    ],
)
def test_the_name_goes_with_the_password(
    tmp_path: Path, url: str, bare: str, credentials: tuple[str, ...]
) -> None:
    """And the rest of the URL stays as it is."""
    (tmp_path / "password").write_text("word\n")
    settings = load_settings(redis={"url": url, "password_file": str(tmp_path / "password")})
    found, password = server_of(settings)
    assert found == bare
    assert password is not None
    assert password.get_credentials() == credentials


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), ("", "is empty"), (" \n", "is empty")]
)
def test_a_file_without_a_password_is_refused_by_name(
    tmp_path: Path, content: str | None, said: str
) -> None:
    """When a program starts, not with its first request."""
    path = tmp_path / "password"
    if content is not None:
        path.write_text(content)
    settings = load_settings(redis={"url": "redis://localhost:1", "password_file": str(path)})
    with pytest.raises(ConfigurationError, match=said) as refused:
        connect(settings)
    assert str(path) in refused.value.message
