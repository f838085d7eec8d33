"""Engine processes that die, stop and come back, with requests inside them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import EngineCrashed, EngineUnavailable, VlmqError
from tests.contract.conftest import StartHost, run_dir, start_host
from tests.contract.hosts import MODEL, PATIENCE_S, RawClient, Stream, ask, wait_for
from workers.inference.engines import wire
from workers.inference.engines.base import Completion
from workers.inference.engines.client import EngineClient
from workers.inference.engines.flight import Flight

__all__ = ["run_dir", "start_host"]

pytestmark = pytest.mark.timeout(120)

FAULTS = {"faults": True}


def connect(flight: Flight, replicas: int) -> None:
    """Wait until a flight is connected to that many hosts."""

    def connected() -> bool:
        flight.submit([])
        return flight.connected == replicas

    wait_for(connected, f"{replicas} replicas")


def collect(flight: Flight, count: int) -> dict[int, Completion | VlmqError]:
    """Wait for that many answers."""
    answers: dict[int, Completion | VlmqError] = {}
    while len(answers) < count:
        got = flight.results(PATIENCE_S)
        assert got, f"only {len(answers)} of {count} answers came"
        answers |= dict(got)
    return answers


def test_kill_9_fails_every_prompt_inside_and_the_flight_goes_on(
    run_dir: Path, start_host: StartHost
) -> None:
    """Running and waiting prompts end as EngineCrashed; the restarted replica serves the next."""
    host = start_host(options=FAULTS, spec={"max_running": 4})
    with Flight(run_dir, MODEL) as flight:
        connect(flight, 1)
        flight.submit([ask("[[echo:hang]]", i) for i in range(20)])
        assert flight.results(0.1) == []
        host.kill()
        answers = collect(flight, 20)
        assert {type(answer) for answer in answers.values()} == {EngineCrashed}
        flight.submit([ask("after", 1)])
        start_host(ready=False)
        [(_, answer)] = flight.results(PATIENCE_S)
    assert isinstance(answer, Completion)
    assert answer.text == "after"


def test_a_poisonous_prompt_takes_down_one_replica_only(
    run_dir: Path, start_host: StartHost
) -> None:
    """What was on the other replica is answered; nothing is answered twice or not at all."""
    for replica in (0, 1):
        start_host(replica, options={**FAULTS, "delay_s": 0.05}, spec={"max_running": 4})
    with Flight(run_dir, MODEL) as flight:
        connect(flight, 2)
        prompts = [ask(f"item {i}", i) for i in range(60)]
        prompts[10] = ask("[[echo:kill]]", 10)
        flight.submit(prompts)
        answers = collect(flight, 60)
        assert flight.results(0) == []
    crashed = {i for i, answer in answers.items() if isinstance(answer, EngineCrashed)}
    answered = {i for i, answer in answers.items() if isinstance(answer, Completion)}
    assert 10 in crashed
    assert crashed | answered == set(range(60))
    assert len(answered) >= 30, "the healthy replica lost work"


def test_streams_that_had_begun_end_as_crashed(run_dir: Path, start_host: StartHost) -> None:
    """A client that saw half an answer is told, and gets nothing twice."""
    host = start_host(options={"token_delay_s": 0.02})
    client = EngineClient(run_dir, MODEL)
    streams = [Stream(client, "word " * 2000) for _ in range(5)]
    assert all(stream.first.wait(PATIENCE_S) for stream in streams)
    start_host(1)
    host.kill()
    assert [type(stream.result()) for stream in streams] == [EngineCrashed] * 5
    client.close()


def test_a_stream_without_a_delta_is_tried_once_more(run_dir: Path, start_host: StartHost) -> None:
    """The other replica answers as if nothing had happened."""
    first = start_host(0, options={"delay_s": 60.0})
    client = EngineClient(run_dir, MODEL)
    stream = Stream(client, "patient")
    wait_for(lambda: [r.running for r in client.replicas()] == [1], "it to run")
    start_host(1)
    first.kill()
    assert stream.result() is None
    assert "".join(delta.text for delta in stream.deltas) == "patient"
    client.close()


def test_a_poisonous_stream_is_not_tried_for_ever(run_dir: Path, start_host: StartHost) -> None:
    """It costs two replicas at most, never the third."""
    hosts = [start_host(replica, options=FAULTS) for replica in range(3)]
    client = EngineClient(run_dir, MODEL)
    wait_for(lambda: len(client.replicas()) == 3, "three replicas")
    assert isinstance(Stream(client, "[[echo:kill]]").result(), EngineCrashed)
    assert client.complete(ask("alive"), timeout_s=PATIENCE_S).text == "alive"
    # A dying process closes its sockets a moment before its parent can see it dead.
    wait_for(lambda: sum(host.process.poll() is None for host in hosts) < 2, "two deaths")
    assert sum(host.process.poll() is None for host in hosts) == 1
    client.close()


def test_after_a_crash_without_successor_a_stream_ends_as_unavailable(
    run_dir: Path, start_host: StartHost
) -> None:
    """It waits for a restart for wait_s, then says so."""
    host = start_host(options={"delay_s": 60.0})
    client = EngineClient(run_dir, MODEL, wait_s=0.5)
    stream = Stream(client, "nobody left")
    wait_for(lambda: [r.running for r in client.replicas()] == [1], "it to run")
    host.kill()
    assert isinstance(stream.result(), EngineUnavailable)
    client.close()


def test_sigterm_finishes_what_runs_and_refuses_the_rest(start_host: StartHost) -> None:
    """Running prompts are answered, waiting and new ones told, the socket goes, exit 0."""
    host = start_host(options=FAULTS, spec={"max_running": 2})
    with RawClient(host.socket) as client:
        prompts = [ask("[[echo:sleep=0.8]] slept", i) for i in range(5)]
        client.send(wire.Submit(prompts, "whole", "chat"))
        client.send(wire.Ping())
        client.expect(wire.Load)
        host.terminate()
        client.expect(wire.Draining)
        refused = client.expect(wire.Failed).items
        assert [(i, code) for i, code, *_ in refused] == [
            (i, EngineUnavailable.code) for i in (2, 3, 4)
        ]
        assert not host.socket.exists()
        client.send(wire.Submit([ask("too late", 9)], "whole", "chat"))
        assert client.expect(wire.Failed).items[0][:2] == (9, EngineUnavailable.code)
        done: list[int] = []
        while len(done) < 2:
            done += [i for i, _ in client.expect(wire.Done).items]
        assert sorted(done) == [0, 1]
    assert host.status() == 0


def test_a_drain_has_a_limit(start_host: StartHost) -> None:
    """What hangs is failed explicitly, and the process ends all the same with status 0."""
    host = start_host(options=FAULTS, drain_limit_s=0.3)
    with RawClient(host.socket) as client:
        client.send(wire.Submit([ask("[[echo:hang]]", 1)], "whole", "chat"))
        client.send(wire.Submit([ask("[[echo:hang]]", 2)], "stream", "chat"))
        client.send(wire.Ping())
        client.expect(wire.Load)
        host.terminate()
        failed = client.expect(wire.Failed).items
        assert sorted(i for i, *_ in failed) == [1, 2]
        assert {code for _, code, *_ in failed} == {EngineUnavailable.code}
    assert host.status() == 0


def test_a_second_sigterm_cuts_the_drain_short(start_host: StartHost) -> None:
    """For whoever cannot wait for the limit."""
    host = start_host(options=FAULTS, drain_limit_s=600.0)
    with RawClient(host.socket) as client:
        client.send(wire.Submit([ask("[[echo:hang]]", 1)], "whole", "chat"))
        client.send(wire.Ping())
        client.expect(wire.Load)
        host.terminate()
        client.expect(wire.Draining)
        host.terminate()
        assert client.expect(wire.Failed).items[0][0] == 1
    assert host.status() == 0


def test_a_drained_replica_hands_its_batch_over(run_dir: Path, start_host: StartHost) -> None:
    """A rolling restart loses no prompt of a flight and fails none."""
    old = start_host(0, options={"delay_s": 0.05}, spec={"max_running": 2})
    with Flight(run_dir, MODEL) as flight:
        connect(flight, 1)
        flight.submit([ask(f"item {i}", i) for i in range(40)])
        old.terminate()
        start_host(0, ready=False)
        answers = collect(flight, 40)
    assert {type(answer) for answer in answers.values()} == {Completion}
    assert old.status() == 0


def has_ended(link: socket.socket) -> bool:
    """Whether the other side has said its last, read or not."""
    poller = select.poll()
    poller.register(link.fileno(), select.POLLRDHUP)
    return bool(poller.poll(0))


def test_who_writes_to_a_host_that_has_stopped_still_reads_the_last_answers(
    start_host: StartHost,
) -> None:
    """Else a client that announces a chat in that moment would take them for lost in a crash."""
    host = start_host()
    with RawClient(host.socket) as client:
        client.send(wire.Submit([ask("one two", 1)], "stream", "chat"))
        client.expect(wire.Deltas)
        host.terminate()
        wait_for(lambda: has_ended(client.socket), "the host to have said its last")
        client.send(wire.Chats(1))
        client.send(wire.Submit([ask("too late", 2)], "stream", "chat"))
        assert [prompt_id for prompt_id, _ in client.expect(wire.Done).items] == [1]
        with pytest.raises(ConnectionResetError):
            client.expect(wire.Failed)
    assert host.status() == 0


def test_a_draining_host_leaves_its_successors_socket_alone(start_host: StartHost) -> None:
    """The new process took the name; the old one must not remove it on its way out."""
    old = start_host(0)
    new = start_host(0)
    old.terminate()
    assert old.status() == 0
    with RawClient(new.socket) as client:
        assert client.hello.pid == new.pid


def test_a_sick_engine_ends_its_process(start_host: StartHost) -> None:
    """Bad health fails what is inside as crashed and exits nonzero, so that it is restarted."""
    host = start_host(options=FAULTS)
    with RawClient(host.socket) as client:
        client.send(wire.Submit([ask("[[echo:sick]] [[echo:hang]]", 1)], "whole", "chat"))
        assert client.expect(wire.Failed).items[0][:2] == (1, EngineCrashed.code)
    assert host.status() == 1


def test_kill_9_of_the_parent_takes_the_engine_along(run_dir: Path) -> None:
    """No engine process is left holding a GPU."""
    socket = wire.socket_path(run_dir, MODEL, 0)
    program = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'workers.inference.engines.host', '--engine', 'echo',\n"
        f"  '--replica', '0', '--parent', str(os.getpid()), '--socket', {str(socket)!r}]\n"
        "child = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
        f'child.stdin.write(b\'{{"model": "{MODEL}"}}\')\n'
        "child.stdin.close()\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for(socket.exists, "the engine process")
        with RawClient(socket) as client:
            child = client.hello.pid
            parent.kill()
            parent.wait(PATIENCE_S)
            with pytest.raises(ConnectionResetError):
                client.expect(wire.Done)
        wait_for(lambda: not _alive(child), "the engine process to die")
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)


def test_a_host_whose_parent_is_gone_already_does_not_start(run_dir: Path) -> None:
    """The parent it was told of is not the one it has."""
    socket = wire.socket_path(run_dir, MODEL, 0)
    command = [sys.executable, "-m", "workers.inference.engines.host", "--engine", "echo"]
    command += ["--replica", "0", "--socket", str(socket), "--parent", "1"]
    ended = subprocess.run(command, input=b'{"model": "m"}', timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert not socket.exists()


def test_a_stopped_host_does_not_stop_the_others(run_dir: Path, start_host: StartHost) -> None:
    """SIGSTOP on one replica: work sent to the other is answered; after SIGCONT all is."""
    hosts = [start_host(replica, options={"delay_s": 0.01}) for replica in (0, 1)]
    with Flight(run_dir, MODEL, window=40) as flight:
        connect(flight, 2)
        os.kill(hosts[0].pid, signal.SIGSTOP)
        flight.submit([ask(f"item {i}", i) for i in range(100)])
        answers = collect(flight, 60)
        os.kill(hosts[0].pid, signal.SIGCONT)
        answers |= collect(flight, 100 - len(answers))
    assert {type(answer) for answer in answers.values()} == {Completion}


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
