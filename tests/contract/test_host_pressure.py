"""An engine process whose clients have more images than it may hold: real processes and sockets."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from shared.errors import EngineCrashed
from tests.contract.conftest import StartHost
from tests.contract.hosts import MODEL, PATIENCE_S, RawClient, ask, wait_for
from workers.inference.engines import wire
from workers.inference.engines.base import Answer, Completion, Image, Prompt, Sampling, Turn
from workers.inference.engines.client import EngineClient
from workers.inference.engines.flight import Flight

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
LIMIT = 8 * MIB
FRAME = wire.TARGET_FRAME_BYTES
HANGING = {"options": {"faults": True}, "spec": {"max_running": 4}, "max_waiting_bytes": LIMIT}


def about_an_image(text: str, prompt_id: int, size_bytes: int = MIB) -> Prompt:
    """A prompt with an image, which the echo engine does not look at."""
    return Prompt(prompt_id, [Turn("user", [0, text])], Sampling(), [Image(bytes(size_bytes))])


def load_of(client: RawClient) -> wire.Load:
    """What the engine does now."""
    client.send(wire.Ping())
    return client.expect(wire.Load)


def overfill(flight: Flight, watcher: RawClient) -> wire.Load:
    """Offer an engine 64 images that it cannot answer; what it does when it took what it takes."""
    flight.submit([about_an_image("[[echo:hang]]", number) for number in range(64)])
    wait_for(
        lambda: (flight.results(0.05), load_of(watcher))[1].running == 3, "the engine to be full"
    )
    flight.results(0.5)
    return [load_of(watcher) for _ in range(20)][-1]


def test_no_more_images_wait_inside_than_may(run_dir: Path, start_host: StartHost) -> None:
    """Given 64 images of which 8 may wait, then about so many do, and a chat is answered."""
    host = start_host(**HANGING)
    with RawClient(host.socket) as watcher, Flight(run_dir, MODEL) as flight:
        assert overfill(flight, watcher).waiting * MIB <= LIMIT + 2 * FRAME
        with contextlib.closing(EngineClient(run_dir, MODEL)) as client:
            assert client.complete(ask("a chat"), timeout_s=PATIENCE_S).text


def test_who_is_not_read_can_still_take_everything_back(
    run_dir: Path, start_host: StartHost
) -> None:
    """Given an engine that hangs with all it may hold, then an abort reaches it."""
    host = start_host(**HANGING)
    with RawClient(host.socket) as watcher, Flight(run_dir, MODEL) as flight:
        overfill(flight, watcher)
        flight.abort()
        wait_for(
            lambda: (flight.results(0.01), load_of(watcher))[1] == wire.Load(0, 0),
            "the engine to be empty",
        )
        flight.submit([ask("and on", 1)])
        assert [number for number, _ in flight.results(PATIENCE_S)] == [1]


def test_who_is_not_read_and_goes_leaves_nothing(run_dir: Path, start_host: StartHost) -> None:
    """Given a process that dies while it is not read, then its prompts leave the engine."""
    host = start_host(**HANGING)
    with RawClient(host.socket) as watcher:
        with Flight(run_dir, MODEL) as flight:
            overfill(flight, watcher)
        wait_for(lambda: load_of(watcher) == wire.Load(0, 0), "the engine to be empty")


def test_everything_is_answered_once_however_little_may_wait(
    run_dir: Path, start_host: StartHost
) -> None:
    """Given three processes with many times what may wait, then no prompt is lost or doubled."""
    start_host(options={"delay_s": 0.01}, spec={"max_running": 8}, max_waiting_bytes=LIMIT)
    with contextlib.ExitStack() as stack:
        flights = [stack.enter_context(Flight(run_dir, MODEL)) for _ in range(3)]
        for flight in flights:
            flight.submit([about_an_image(f"image {number}", number) for number in range(80)])
        answers: list[Answer] = []
        while any(flight.in_flight for flight in flights):
            for flight in flights:
                answers += flight.results(0.02)
    assert sorted(number for number, _ in answers) == sorted([*range(80)] * 3)
    assert all(isinstance(answer, Completion) for _, answer in answers)


def test_an_image_larger_than_may_wait_is_answered_too(
    run_dir: Path, start_host: StartHost
) -> None:
    """Given images each beyond the bound, then they pass one after the other."""
    start_host(options={"delay_s": 0.01}, spec={"max_running": 2}, max_waiting_bytes=MIB)
    with Flight(run_dir, MODEL) as flight:
        flight.submit([about_an_image("large", number, 4 * MIB) for number in range(10)])
        answers: list[Answer] = []
        while flight.in_flight:
            answers += flight.results(PATIENCE_S)
    assert not [answer for _, answer in answers if isinstance(answer, EngineCrashed)]
    assert len(answers) == 10
