"""Idempotency keys on a real Valkey."""

from __future__ import annotations

import time

import pytest

from shared.errors import IdempotencyInProgress, IdempotencyMismatch
from shared.stores import Stores


def test_the_second_time_gets_the_first_answer(own_stores: Stores) -> None:
    """The work is done once."""
    keys = own_stores.idempotency
    assert keys.claim("ann", "files", "k", "print") is None
    keys.finish("ann", "files", "k", "print", 200, b"answer")
    assert keys.claim("ann", "files", "k", "print") == b"answer"


def test_while_the_first_is_at_work_the_second_must_wait(own_stores: Stores) -> None:
    """With an error that says to try again."""
    keys = own_stores.idempotency
    keys.claim("ann", "files", "k", "print")
    with pytest.raises(IdempotencyInProgress) as refused:
        keys.claim("ann", "files", "k", "print")
    assert refused.value.retryable


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_key_belongs_to_one_request(own_stores: Stores, is_finished: bool) -> None:
    """Another request under the same key is refused for good."""
    keys = own_stores.idempotency
    keys.claim("ann", "files", "k", "print")
    if is_finished:
        keys.finish("ann", "files", "k", "print", 200, b"answer")
    with pytest.raises(IdempotencyMismatch) as refused:
        keys.claim("ann", "files", "k", "other")
    assert not refused.value.retryable


@pytest.mark.parametrize(("owner", "route"), [("bob", "files"), ("ann", "batches")])
def test_keys_of_other_owners_and_routes_are_other_keys(
    own_stores: Stores, owner: str, route: str
) -> None:
    """Nobody can learn of another's answer."""
    keys = own_stores.idempotency
    keys.claim("ann", "files", "k", "print")
    keys.finish("ann", "files", "k", "print", 200, b"answer")
    assert keys.claim(owner, route, "k", "print") is None


def test_after_a_failure_the_key_is_free(own_stores: Stores) -> None:
    """So that the same request may be tried again."""
    keys = own_stores.idempotency
    keys.claim("ann", "files", "k", "print")
    keys.release("ann", "files", "k")
    assert keys.claim("ann", "files", "k", "print") is None


def test_a_key_whose_server_died_frees_itself(own_stores: Stores) -> None:
    """After the longest that the work can take; an answer is kept for a day."""
    keys = own_stores.idempotency
    keys.claim("ann", "files", "k", "print", limit_s=0.2)
    time.sleep(0.3)
    assert keys.claim("ann", "files", "k", "print") is None
    keys.finish("ann", "files", "k", "print", 200, b"answer")
    [name] = own_stores.redis.keys("vlmq:idempotency:*")
    assert 86_000 < own_stores.redis.ttl(name) <= 86_400
