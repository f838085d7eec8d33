"""The bound on image bytes in a process: real threads."""

from __future__ import annotations

import threading
import time

import pytest

from shared.errors import RateLimited
from workers.inference.image_room import ImageRoom


def test_a_reader_waits_until_enough_was_let_go() -> None:
    """Room is what others have left."""
    room = ImageRoom(100, readers=2)
    entered = threading.Event()

    def read() -> None:
        with room.reading(time.time() + 10):
            entered.set()

    with room.holding(100):
        thread = threading.Thread(target=read)
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(5)
    thread.join()


def test_a_reader_that_finds_no_room_in_time_is_told_to_come_again() -> None:
    """Instead of waiting for ever."""
    room = ImageRoom(100, readers=1)
    with room.holding(100), pytest.raises(RateLimited), room.reading(time.time() + 0.05):
        pass


def test_only_so_many_read_at_once() -> None:
    """And the next one enters when one of them leaves."""
    room = ImageRoom(100, readers=1)
    with room.reading(time.time() + 1), pytest.raises(RateLimited), room.reading(time.time()):
        pass
    with room.reading(time.time() + 1):
        pass
