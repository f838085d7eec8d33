"""Finding replicas and choosing between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from workers.inference.engines.replicas import Replica, SocketWatch, least_busy
from workers.inference.engines.wire import VERSION, Draining, Hello, Load


def hello(model: str = "m", version: int = VERSION, max_running: int = 4) -> Hello:
    """A greeting."""
    return Hello(version, model, 0, "echo", 1, 100, max_running, 10)


@dataclass
class Link:
    """A connection without a socket."""

    replica: Replica[int] = field(default_factory=Replica)


def link(in_flight: int = 0, max_running: int = 4) -> Link:
    """A greeted replica with so many prompts of ours."""
    made = Link()
    made.replica.note(hello(max_running=max_running), "m")
    made.replica.in_flight = dict.fromkeys(range(in_flight), 0)
    return made


def test_the_replica_with_the_least_per_slot_is_chosen() -> None:
    """A larger replica takes more."""
    small, large = link(2, max_running=4), link(5, max_running=16)
    assert least_busy([small, large], 0.0) is large


def test_work_of_other_clients_counts() -> None:
    """Only what is not ours is taken from the host's report."""
    one, two = link(3), link(0)
    two.replica.note(Load(running=4, waiting=4), "m")
    assert least_busy([one, two], 0.0) is one
    one.replica.note(Load(running=3, waiting=0), "m")
    assert one.replica.busyness == 3 / 4


def test_replicas_that_drain_pause_or_have_not_greeted_are_left_out() -> None:
    """None is left, so the caller waits."""
    draining, paused, silent = link(), link(), Link()
    draining.replica.note(Draining(), "m")
    paused.replica.paused_until_s = 5.0
    assert least_busy([draining, paused, silent], 1.0) is None
    assert least_busy([draining, paused, silent], 6.0) is paused


def test_a_replica_takes_no_more_than_it_can_queue() -> None:
    """Four running and ten waiting."""
    assert link(13).replica.room(0.0) == 1
    assert link(14).replica.room(0.0) == 0


@pytest.mark.parametrize("greeting", [hello(model="other"), hello(version=VERSION + 1)])
def test_a_host_one_cannot_talk_to_is_refused(greeting: Hello) -> None:
    """Another model or another version of the protocol."""
    with pytest.raises(ConfigurationError):
        Replica[int]().note(greeting, "m")


def test_a_socket_that_refuses_is_tried_later_and_later(tmp_path: Path) -> None:
    """The pauses double; a greeting makes them short again."""
    path = tmp_path / "0.sock"
    path.touch()
    watch = SocketWatch(tmp_path)
    assert watch.due(0.0) == [path]
    watch.closed(path, 0.0)
    assert watch.due(0.04) == []
    assert watch.due(0.06) == [path]
    watch.closed(path, 0.06)
    assert watch.due(0.12) == []
    assert watch.due(0.17) == [path]
    watch.greeted(path)
    watch.closed(path, 1.0)
    assert watch.due(1.06) == [path]


def test_a_new_socket_under_an_old_name_is_tried_at_once(tmp_path: Path) -> None:
    """A restarted host need not wait for its predecessor's back-off."""
    path = tmp_path / "0.sock"
    path.touch()
    watch = SocketWatch(tmp_path)
    for _ in range(10):
        watch.due(0.0)
        watch.closed(path, 0.0)
    assert watch.due(0.5) == []
    (tmp_path / "0.new").touch()
    (tmp_path / "0.new").rename(path)
    assert watch.due(0.5) == [path]


def test_open_and_vanished_sockets_are_not_due(tmp_path: Path) -> None:
    """Nor is anything that is not a socket's name, nor a folder that does not exist yet."""
    assert SocketWatch(tmp_path / "none").due(0.0) == []
    for name in ("0.sock", "1.sock", "2.new"):
        (tmp_path / name).touch()
    watch = SocketWatch(tmp_path)
    assert sorted(p.name for p in watch.due(0.0)) == ["0.sock", "1.sock"]
    watch.opened(tmp_path / "0.sock")
    (tmp_path / "1.sock").unlink()
    assert watch.due(0.0) == []
