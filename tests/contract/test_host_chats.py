"""What engine processes hear of chats that wait: real processes, and a host by hand to see frames."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from shared.errors import EngineUnavailable, RequestAborted
from tests.contract.conftest import StartHost
from tests.contract.hosts import (
    MODEL,
    PATIENCE_S,
    HostProcess,
    RawClient,
    Stream,
    ask,
    everything,
    wait_for,
)
from workers.inference.engines import client as engine_client
from workers.inference.engines import wire
from workers.inference.engines.base import (
    Answer,
    Completion,
    Delta,
    EngineSpec,
    Prompt,
    complete_each,
    let_go,
)
from workers.inference.engines.client import EngineClient
from workers.inference.engines.echo import EchoEngine
from workers.inference.engines.flight import Flight

pytestmark = pytest.mark.timeout(120)

HURRIED = "were you hurried?"
ATTENTIVE = {
    "engine": "tests.contract.test_host_chats:AttentiveEngine",
    "options": {"faults": True},
}


class AttentiveEngine(EchoEngine):
    """Says what it was told of hurry when it is asked; otherwise it echoes."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._told: list[bool] = []

    def hurry(self, hurried: bool) -> None:
        """Remembered."""
        self._told.append(hurried)

    async def generate(self, prompt: Prompt) -> AsyncIterator[Delta]:
        """What it was told, or an echo."""
        if prompt.turns[-1].parts == [HURRIED]:
            yield Delta(json.dumps(self._told), "stop", 1, 1)
            return
        deltas = super().generate(prompt)
        try:
            async for delta in deltas:
                yield delta
        finally:
            await let_go(deltas)

    async def complete(self, prompts: Sequence[Prompt]) -> AsyncIterator[Answer]:
        """Each by itself."""
        async for answer in complete_each(self, prompts):
            yield answer


class RawHost:
    """The other end of a client, by hand: it sees each frame and says what it is told to."""

    def __init__(self, run_dir: Path, replica: int = 0, *, device: str = "0") -> None:
        self._replica = replica
        self._device = device
        self._frames = wire.frames_to_host()
        self._unread: list[wire.ToHost] = []
        self._link: socket.socket | None = None
        path = wire.socket_path(run_dir, MODEL, replica)
        path.parent.mkdir(exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(PATIENCE_S)
        self._listener.bind(str(path))
        self._listener.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if self._link is not None:
            self._link.close()

    def greet(self) -> None:
        """Wait for the client, and say who this is."""
        self._link, _ = self._listener.accept()
        self._link.settimeout(PATIENCE_S)
        self.send(
            wire.Hello(
                version=wire.VERSION,
                model=MODEL,
                replica=self._replica,
                engine="by hand",
                pid=self._replica,
                session_len=100,
                max_running=8,
                max_waiting=100,
                device=self._device,
            )
        )

    def send(self, message: wire.FromHost) -> None:
        """Say something."""
        assert self._link is not None
        self._link.sendall(wire.encode(message))

    def receive(self) -> wire.ToHost:
        """The next message."""
        assert self._link is not None
        while not self._unread:
            data = self._link.recv(1 << 18)
            assert data, "the client hung up"
            self._unread += self._frames.feed(data)
        return self._unread.pop(0)

    def counts_before_the_prompt(self) -> tuple[list[int], int]:
        """Which numbers of chats were announced before the next prompt came, and its id."""
        counts: list[int] = []
        while isinstance(message := self.receive(), wire.Chats):
            counts.append(message.waiting)
        assert isinstance(message, wire.Submit)
        return counts, message.prompts[0].id


class Asking:
    """Asks one engine process what it was told; its questions are no chats."""

    def __init__(self, host: HostProcess) -> None:
        self._client = RawClient(host.socket)
        self._last_id = 0

    def told(self) -> list[bool]:
        """What the engine was told so far."""
        self._last_id += 1
        self._client.send(wire.Submit([ask(HURRIED, self._last_id)], "whole", "batch"))
        told: list[bool] = json.loads(self._client.expect(wire.Done).items[0][1].text)
        return told

    def until_told(self, *expected: bool) -> None:
        """Wait until the engine was told exactly this."""
        wait_for(lambda: self.told() == [*expected], f"the engine to be told {expected}")

    def close(self) -> None:
        """Hang up."""
        self._client.socket.close()


@pytest.fixture
def on_device(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Asking]]:
    """Start attentive engine processes, each on a device, and ask them."""
    asking: list[Asking] = []

    def start(device: str, replica: int = 0) -> Asking:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", device)
        asking.append(Asking(start_host(replica, **ATTENTIVE)))
        return asking[-1]

    yield start
    for one in asking:
        one.close()


@pytest.fixture
def client(run_dir: Path) -> Iterator[EngineClient]:
    """A client of the test's model."""
    with contextlib.closing(EngineClient(run_dir, MODEL)) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, no chat that is expected comes too late."""
    monkeypatch.setattr(engine_client, "EXPECTED_S", 10 * PATIENCE_S)


def until_greeted(client: EngineClient, count: int) -> None:
    """Wait until the client knows so many replicas."""
    wait_for(lambda: len(client.replicas()) == count, f"{count} replicas to greet")


def until_greeted_by(host: RawHost, client: EngineClient) -> None:
    """Let the client find a host, and wait until it knows it."""
    before = len(client.replicas())
    host.greet()
    until_greeted(client, before + 1)


def test_a_chat_is_announced_until_its_first_word(run_dir: Path, client: EngineClient) -> None:
    """One before its prompt, none after the first delta, and again with the next chat."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        for _ in range(2):
            stream = Stream(client, "hello")
            counts, wire_id = host.counts_before_the_prompt()
            assert counts == [1]
            host.send(wire.Deltas([(wire_id, "hel")]))
            assert host.receive() == wire.Chats(0)
            assert not stream.ends
            host.send(wire.Deltas([(wire_id, "lo")]))
            host.send(wire.Done([(wire_id, Completion("", "stop", 1, 1))]))
            assert stream.result() is None


def test_chats_that_wait_together_are_counted(run_dir: Path, client: EngineClient) -> None:
    """Each comes and goes by itself, in whichever order."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        ids: list[int] = []
        for count in (1, 2, 3):
            Stream(client, "hello")
            counts, wire_id = host.counts_before_the_prompt()
            assert counts == [count]
            ids.append(wire_id)
        for left, wire_id in ((2, ids[1]), (1, ids[2]), (0, ids[0])):
            host.send(wire.Deltas([(wire_id, "word")]))
            assert host.receive() == wire.Chats(left)


def test_a_batch_prompt_is_no_chat(run_dir: Path, client: EngineClient) -> None:
    """It is sent without a word about it."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        Stream(client, "a batch", lane="batch")
        counts, wire_id = host.counts_before_the_prompt()
        assert counts == []
        host.send(wire.Deltas([(wire_id, "word")]))
        Stream(client, "a chat")
        assert host.counts_before_the_prompt()[0] == [1]


def test_a_chat_that_ends_without_a_word_is_taken_back(run_dir: Path, client: EngineClient) -> None:
    """Given up, failed, or answered with nothing: it waits no longer."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        stream = Stream(client, "given up")
        counts, wire_id = host.counts_before_the_prompt()
        assert counts == [1]
        stream.handle.abort()
        assert [host.receive(), host.receive()] == [wire.Abort([wire_id]), wire.Chats(0)]
        assert isinstance(stream.result(), RequestAborted)
        for end in (
            lambda number: wire.Failed([(number, "engine_error", "no", None)]),
            lambda number: wire.Done([(number, Completion("", "stop", 1, 0))]),
        ):
            Stream(client, "no word")
            counts, wire_id = host.counts_before_the_prompt()
            assert counts == [1]
            host.send(end(wire_id))
            assert host.receive() == wire.Chats(0)


def test_a_chat_that_is_turned_away_waits_on_for_a_neighbour(
    run_dir: Path, client: EngineClient
) -> None:
    """On another device: there it is announced, and where it was it is taken back."""
    with RawHost(run_dir) as first:
        until_greeted_by(first, client)
        Stream(client, "hello")
        counts, wire_id = first.counts_before_the_prompt()
        with RawHost(run_dir, 1, device="1") as second:
            until_greeted_by(second, client)
            first.send(wire.Draining())
            first.send(wire.Failed([(wire_id, EngineUnavailable.code, "stopping", None)]))
            assert second.counts_before_the_prompt()[0] == [1]
            assert (counts, first.receive()) == ([1], wire.Chats(0))


def test_a_chat_that_loses_its_engine_waits_for_another(
    run_dir: Path, client: EngineClient
) -> None:
    """On the same device, where it has waited all the time and is counted once."""
    with RawHost(run_dir, 1) as second:
        with RawHost(run_dir) as first:
            until_greeted_by(first, client)
            Stream(client, "hello")
            assert first.counts_before_the_prompt()[0] == [1]
            until_greeted_by(second, client)
            assert second.receive() == wire.Chats(1)
        counts, wire_id = second.counts_before_the_prompt()
        assert counts == []
        second.send(wire.Deltas([(wire_id, "word")]))
        assert second.receive() == wire.Chats(0)


def test_a_host_that_appears_while_a_chat_waits_is_told(
    run_dir: Path, client: EngineClient
) -> None:
    """If it computes where the chat is waited for; otherwise it hears nothing."""
    with (
        RawHost(run_dir) as first,
        RawHost(run_dir, 1) as neighbour,
        RawHost(run_dir, 2, device="1") as stranger,
    ):
        until_greeted_by(first, client)
        Stream(client, "hello")
        counts, wire_id = first.counts_before_the_prompt()
        assert counts == [1]
        until_greeted_by(neighbour, client)
        until_greeted_by(stranger, client)
        assert neighbour.receive() == wire.Chats(1)
        first.send(wire.Deltas([(wire_id, "word")]))
        assert first.receive() == wire.Chats(0)
        assert neighbour.receive() == wire.Chats(0)
        for busy in (first, neighbour):
            busy.send(wire.Load(8, 0))
        wait_for(lambda: sum(r.running for r in client.replicas()) == 16, "two to be busy")
        Stream(client, "for the third")
        assert stranger.counts_before_the_prompt()[0] == [1]


def test_a_chat_that_is_expected_counts_once_in_the_end(
    run_dir: Path, client: EngineClient, patient: None
) -> None:
    """Announced before, and as itself when it is there."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        for _ in range(2):
            expected = client.expect()
            assert host.receive() == wire.Chats(1)
            Stream(client, "hello", expected=expected)
            counts, wire_id = host.counts_before_the_prompt()
            assert counts == [2]
            assert host.receive() == wire.Chats(1)
            host.send(wire.Deltas([(wire_id, "word")]))
            assert host.receive() == wire.Chats(0)


def test_another_chat_does_not_pass_for_the_expected_one(
    run_dir: Path, client: EngineClient, patient: None
) -> None:
    """A text that is answered while the images of the other one are still read."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        expected = client.expect()
        assert host.receive() == wire.Chats(1)
        Stream(client, "a text")
        counts, wire_id = host.counts_before_the_prompt()
        assert counts == [2]
        host.send(wire.Deltas([(wire_id, "word")]))
        assert host.receive() == wire.Chats(1)
        Stream(client, "what was expected", expected=expected)
        counts, _ = host.counts_before_the_prompt()
        assert counts == [2]
        assert host.receive() == wire.Chats(1)


def test_a_client_that_is_closed_tells_nobody_any_more(
    run_dir: Path, patient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connections end, which says enough; writing to them would be complained of."""
    with RawHost(run_dir) as host:
        client = EngineClient(run_dir, MODEL)
        until_greeted_by(host, client)
        for _ in range(12):
            Stream(client, "hello")
            host.counts_before_the_prompt()
        client.close()
    assert not caplog.records


def test_what_is_expected_and_does_not_come_is_taken_back(
    run_dir: Path, client: EngineClient
) -> None:
    """Each by itself, as their times come."""
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        client.expect()
        assert host.receive() == wire.Chats(1)
        assert host.receive() == wire.Chats(0)
        for _ in range(3):
            client.expect()
        seen = [host.receive() for _ in range(6)]
        assert seen[0] == wire.Chats(1)
        assert seen[-1] == wire.Chats(0)


def test_without_an_engine_nothing_is_expected(run_dir: Path, client: EngineClient) -> None:
    """Nor is the host that comes later told of it."""
    client.expect()
    with RawHost(run_dir) as host:
        until_greeted_by(host, client)
        Stream(client, "hello")
        assert host.counts_before_the_prompt()[0] == [1]


def test_all_engines_of_a_device_are_told_and_no_others(
    client: EngineClient, on_device: Callable[..., Asking], run_dir: Path
) -> None:
    """Two processes on one GPU hurry for one chat, a third on another GPU does not."""
    first, neighbour = on_device("0", 0), on_device("0", 1)
    stranger = on_device("1", 2)
    until_greeted(client, 3)
    with RawClient(wire.socket_path(run_dir, MODEL, 2)) as busy:
        # So that the chat goes to one of the first two.
        busy.send(wire.Submit([ask("[[echo:hang]]", i) for i in (1, 2, 3)], "whole", "batch"))
        wait_for(lambda: any(status.running == 3 for status in client.replicas()), "one to be busy")
        stream = Stream(client, "[[echo:hang]]")
        first.until_told(True)
        neighbour.until_told(True)
        stream.handle.abort()
        first.until_told(True, False)
        neighbour.until_told(True, False)
        assert stranger.told() == []


def test_a_chat_hurries_its_engine_once(
    client: EngineClient, on_device: Callable[..., Asking], patient: None
) -> None:
    """Expected, asked for and answered: the engine is told twice, at the begin and at the end."""
    asking = on_device("")
    until_greeted(client, 1)
    expected = client.expect()
    asking.until_told(True)
    assert Stream(client, "a chat", expected=expected).result() is None
    asking.until_told(True, False)


def test_an_engine_that_comes_up_while_a_chat_waits_hurries(
    client: EngineClient, on_device: Callable[..., Asking]
) -> None:
    """It shares the GPU with the one that the chat waits for."""
    first = on_device("0", 0)
    until_greeted(client, 1)
    stream = Stream(client, "[[echo:hang]]")
    first.until_told(True)
    second = on_device("0", 1)
    second.until_told(True)
    stream.handle.abort()
    second.until_told(True, False)
    first.until_told(True, False)


def test_fewer_chats_than_none_break_the_protocol(start_host: StartHost) -> None:
    """Who says so is cut off, and what it announced before is forgotten; others are served."""
    host = start_host(**ATTENTIVE)
    with contextlib.closing(Asking(host)) as asking:
        with RawClient(host.socket) as bad:
            bad.send(wire.Chats(2))
            asking.until_told(True)
            bad.send(wire.Chats(-1))
            with pytest.raises(ConnectionResetError):
                bad.expect(wire.Done)
        asking.until_told(True, False)


def test_a_client_that_dies_with_a_chat_announced_leaves_batches_free(
    run_dir: Path, start_host: StartHost
) -> None:
    """Its socket is closed, and so the engine waits for nobody: a batch is answered to the end."""
    host = start_host(**ATTENTIVE, spec={"max_running": 4})
    with contextlib.closing(Asking(host)) as asking, Flight(run_dir, MODEL) as flight:
        with RawClient(host.socket) as dying:
            dying.send(wire.Chats(3))
            asking.until_told(True)
            flight.submit([ask(f"number {i}", i) for i in range(100)])
        asking.until_told(True, False)
        answers = everything(flight)
    assert sorted(answers) == [*range(100)]
    assert all(isinstance(answer, Completion) for answer in answers.values())


def test_a_batch_goes_on_however_long_a_chat_is_announced(
    run_dir: Path, start_host: StartHost
) -> None:
    """A client that announces and never asks makes it slower, no more."""
    host = start_host(spec={"max_running": 4})
    with RawClient(host.socket) as idle, Flight(run_dir, MODEL) as flight:
        idle.send(wire.Chats(1))
        flight.submit([ask(f"number {i}", i) for i in range(100)])
        answers = everything(flight)
    assert sorted(answers) == [*range(100)]
