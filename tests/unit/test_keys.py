"""API keys."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.errors import InvalidValue, NotAuthenticated, NotFound, StorageFailed
from shared.keys import KeyStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of keys."""
    return tmp_path / "keys.json"


def test_a_key_opens_its_owners_door(path: Path) -> None:
    """Another text does not."""
    keys = KeyStore(path)
    record, secret = keys.create("ann", name="laptop")
    other, _ = keys.create("bob")
    assert keys.authenticate(secret) == record
    assert (record.owner, other.owner) == ("ann", "bob")
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), record.digest, record.id):
        with pytest.raises(NotAuthenticated):
            keys.authenticate(wrong)


def test_the_secret_is_kept_nowhere(path: Path) -> None:
    """Only its hash is, and only this user may read it."""
    record, secret = KeyStore(path).create("ann")
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix("vlmq-") not in text
    assert record.digest in text
    assert path.stat().st_mode & 0o077 == 0


def test_other_programs_see_changes_at_once(path: Path) -> None:
    """Without a restart."""
    server, command = KeyStore(path), KeyStore(path)
    assert not server.required()
    record, secret = command.create("ann")
    assert server.required()
    assert server.authenticate(secret) == record
    command.revoke(record.id)
    with pytest.raises(NotAuthenticated):
        server.authenticate(secret)
    assert server.required(), "with the last key revoked the doors stay shut"
    with pytest.raises(NotFound):
        command.revoke(record.id)


def test_keys_made_at_once_are_all_kept(path: Path) -> None:
    """Several commands may run side by side."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: KeyStore(path).create(f"owner{n}")[0], range(16)))
    assert {key.id for key in KeyStore(path).list()} == {key.id for key in made}


@pytest.mark.parametrize("owner", ["", " ", "a b", "a/b", "a:b", "a|b", "ä", "x" * 65, ".a", "a\n"])
def test_owners_have_plain_names(path: Path, owner: str) -> None:
    """They become parts of keys in Redis."""
    with pytest.raises(InvalidValue) as refused:
        KeyStore(path).create(owner)
    assert refused.value.param == "owner"


def test_a_damaged_file_opens_no_door(path: Path) -> None:
    """It is an error, not an empty list."""
    path.write_text('[{"id": 1}]')
    for text in ('[{"id": 1}]', "{"):
        path.write_text(text)
        with pytest.raises(StorageFailed):
            KeyStore(path).authenticate("x")
