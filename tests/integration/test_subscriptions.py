"""Which queues a consumer should take, with a real registry and a real Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.presence import NodeReport, ReplicaReport
from shared.settings import Settings
from shared.stores import Stores
from tests.conftest import connected, store_settings
from workers.inference.engines.standby import Standby
from workers.subscriptions import Wanted


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """A node that serves ``a``."""
    node = {"serve": [{"model": "a", "engine": "echo"}]}
    return store_settings(redis_url, tmp_path, node=node)


@pytest.fixture
def stores(settings: Settings) -> Iterator[Stores]:
    """What other programs use."""
    with connected(settings) as found:
        yield found


@pytest.fixture
def wanted(settings: Settings, stores: Stores) -> Iterator[Wanted]:
    """Those of that node, and whatever is tuned from ``a``."""
    found = Wanted(settings)
    stores.models.link("a", None, engine="echo")
    yield found
    found.close()


def test_queues_follow_the_registry(wanted: Wanted, stores: Stores) -> None:
    """Models of other nodes are left to those."""
    stores.models.link("ft:a::1", None, base="a")
    stores.models.link("elsewhere", None, engine="echo")
    assert wanted.chat() == ["chat.a", "chat.ft:a::1"]
    assert wanted.batch() == ["control", "batch.a", "batch.ft:a::1"]
    stores.models.remove("ft:a::1")
    assert wanted.chat() == ["chat.a"]


def test_a_lent_model_is_left_to_a_machine_that_has_it(
    wanted: Wanted, stores: Stores, settings: Settings
) -> None:
    """Without such a machine its tickets are taken here, so that chats hear the reason."""
    Standby(settings.run_dir, "a").begin("GPU 0 is lent to fine-tune ftjob-1")
    assert wanted.chat() == ["chat.a"]
    ready = NodeReport("other", int(time.time()), [ReplicaReport("a", 0, "ready")])
    stores.presence.announce(ready)
    deadline = time.monotonic() + 10
    while wanted.chat() != []:
        assert time.monotonic() < deadline, "what is known of other nodes is half a second old"
    assert wanted.batch() == ["control"]
    Standby(settings.run_dir, "a").begin()
    assert wanted.chat() == ["chat.a"], "the GPU was given back"
