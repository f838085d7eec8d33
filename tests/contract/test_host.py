"""The engine process as its clients see it: real processes, real sockets."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import (
    ContextLengthExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    GpuLent,
    ImagesCutOtherwise,
    RequestAborted,
    RequestTimedOut,
)
from tests.contract.conftest import SESSION_LEN, Kind, StartHost
from tests.contract.hosts import MODEL, PATIENCE_S, RawClient, Stream, ask, everything, wait_for
from workers.inference.engines import wire
from workers.inference.engines.base import (
    Answer,
    Completion,
    Image,
    Prompt,
    Sampling,
    Tiling,
    Turn,
)
from workers.inference.engines.client import EngineClient
from workers.inference.engines.flight import Flight
from workers.inference.engines.standby import Standby

pytestmark = pytest.mark.timeout(120)

FAULTS = {"faults": True}


def test_whole_answers_come_back_through_the_process(
    kind: Kind, run_dir: Path, start_host: StartHost
) -> None:
    """Every engine: prompts in, one completion or error per id out."""
    start_host(**kind.host_settings())
    prompts = [ask(f"a circle {i}", i, max_tokens=6) for i in range(40)]
    prompts.append(ask("word " * SESSION_LEN * 2, 40))
    with Flight(run_dir, MODEL) as flight:
        flight.submit(prompts)
        answers = everything(flight)
    assert sorted(answers) == list(range(41))
    assert isinstance(answers.pop(40), ContextLengthExceeded)
    assert all(isinstance(answer, Completion) for answer in answers.values())


def test_a_stream_delivers_deltas_then_ends_once(
    kind: Kind, run_dir: Path, start_host: StartHost
) -> None:
    """Every engine: the last delta has the reason, and the end comes after it."""
    start_host(**kind.host_settings())
    client = EngineClient(run_dir, MODEL)
    stream = Stream(client, "a red circle beside a green square")
    assert stream.result() is None
    assert stream.deltas[-1].finish_reason in ("stop", "length")
    assert all(delta.finish_reason is None for delta in stream.deltas[:-1])
    whole = client.complete(ask("a red circle"), timeout_s=PATIENCE_S)
    assert whole.completion_tokens > 0
    client.close()
    assert stream.ends == [None]


def test_the_socket_is_private_and_the_host_introduces_itself(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode 600, and a Hello with the limits and the GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    host = start_host(replica=3, max_waiting=7, spec={"max_running": 5, "session_len": 99})
    assert stat.S_IMODE(host.socket.stat().st_mode) == 0o600
    with RawClient(host.socket) as client:
        assert client.hello == wire.Hello(
            wire.VERSION,
            MODEL,
            3,
            "echo",
            host.pid,
            session_len=99,
            max_running=5,
            max_waiting=7,
            device="5",
        )


def test_the_socket_appears_only_when_the_model_is_loaded(start_host: StartHost) -> None:
    """While the engine loads there is nothing to connect to."""
    host = start_host(ready=False, options={"setup_delay_s": 1.0})
    wait_for(host.socket.parent.exists, "the host to begin")
    assert not host.socket.exists()
    host.until_ready()


@pytest.mark.parametrize(
    ("option", "limit_s", "said"),
    [
        ("fail", 30.0, "failed on its first prompt with a text: the echo engine was told to fail"),
        ("hang", 0.3, "did not answer its first prompts within 0.3 s"),
        ("block", 0.3, "did not answer its first prompts within 0.3 s"),
    ],
)
def test_an_engine_that_fails_its_first_prompt_is_never_ready(
    start_host: StartHost, option: str, limit_s: float, said: str
) -> None:
    """It exits as one that cannot load, with the reason, and no socket appears."""
    host = start_host(ready=False, warm_up_limit_s=limit_s, options={"warm_up": option})
    assert host.status() == 3
    assert said in host.errors().splitlines()[-1]
    assert not host.socket.exists()


def test_a_stale_socket_is_replaced(start_host: StartHost) -> None:
    """A host killed before it could clean up does not stop its successor."""
    first = start_host()
    first.kill()
    assert first.socket.exists()
    second = start_host()
    with RawClient(second.socket) as client:
        assert client.hello.pid == second.pid


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": {"fail_setup": True}}, "told to fail"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"engine": "nonsense"}, "there is no engine 'nonsense'"),
        ({"engine": "no_such_module:Engine"}, "no_such_module"),
        ({"spec": {"max_running": 0}}, "max_running"),
    ],
)
def test_a_setup_that_cannot_succeed_exits_3_with_one_line(
    start_host: StartHost, settings: dict[str, object], says: str
) -> None:
    """The parent must not restart it; the reason is readable."""
    host = start_host(ready=False, **settings)
    assert host.status() == 3
    [line] = host.errors().splitlines()
    assert says in line


def test_a_malformed_frame_closes_that_connection_only(start_host: StartHost) -> None:
    """Rubbish, and a length beyond the limit, cut off their sender; others are served."""
    host = start_host()
    with RawClient(host.socket) as good:
        for rubbish in (b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"):
            with RawClient(host.socket) as bad:
                bad.socket.sendall(rubbish)
                with pytest.raises(ConnectionResetError):
                    bad.expect(wire.Done)
        good.send(wire.Submit([ask("still here", 5)], "whole", "chat"))
        assert good.expect(wire.Done).items[0][1].text == "still here"


def test_an_id_in_use_breaks_the_protocol(start_host: StartHost) -> None:
    """Two prompts of one connection cannot share an id."""
    host = start_host(options=FAULTS)
    with RawClient(host.socket) as client:
        client.send(wire.Submit([ask("[[echo:hang]]", 5)], "whole", "batch"))
        client.send(wire.Submit([ask("twice", 5)], "whole", "batch"))
        with pytest.raises(ConnectionResetError):
            client.expect(wire.Done)


def test_ids_of_two_connections_do_not_clash(start_host: StartHost) -> None:
    """Each connection has its own ids."""
    host = start_host(options={"delay_s": 0.1})
    with RawClient(host.socket) as one, RawClient(host.socket) as two:
        one.send(wire.Submit([ask("for one", 1)], "whole", "batch"))
        two.send(wire.Submit([ask("for two", 1)], "whole", "batch"))
        assert one.expect(wire.Done).items[0][1].text == "for one"
        assert two.expect(wire.Done).items[0][1].text == "for two"


def test_errors_of_one_prompt_leave_its_group_alone(run_dir: Path, start_host: StartHost) -> None:
    """An engine error and an outright bug both come back as errors of their own prompt."""
    start_host(options=FAULTS)
    with Flight(run_dir, MODEL) as flight:
        flight.submit(
            [ask("[[echo:error]]", 0), ask("[[echo:bug]]", 1), *[ask("fine", i) for i in (2, 3)]]
        )
        answers = everything(flight)
    assert [type(answers[i]) for i in range(4)] == [
        EngineError,
        EngineError,
        Completion,
        Completion,
    ]
    assert "asked" in str(answers[0])
    assert "RuntimeError" in str(answers[1])


def test_a_slow_prompt_holds_back_neither_answers_nor_admission(
    run_dir: Path, start_host: StartHost
) -> None:
    """199 prompts pass through the other slots while one sleeps."""
    start_host(options=FAULTS, spec={"max_running": 8})
    with Flight(run_dir, MODEL) as flight:
        flight.submit([ask("[[echo:hang]]", 0), *[ask(f"quick {i}", i) for i in range(1, 200)]])
        answers: dict[int, object] = {}
        while len(answers) < 199:
            answers |= dict(flight.results(PATIENCE_S))
        assert 0 not in answers
        assert flight.in_flight == 1


def test_prompts_beyond_the_waiting_bound_fail_as_busy(start_host: StartHost) -> None:
    """Two run, three wait, the rest is told at once."""
    host = start_host(options=FAULTS, max_waiting=3, spec={"max_running": 2})
    with RawClient(host.socket) as client:
        prompts = [ask("[[echo:hang]]", i) for i in range(20)]
        client.send(wire.Submit(prompts, "whole", "chat"))
        refused = client.expect(wire.Failed).items
        assert [i for i, *_ in refused] == list(range(5, 20))
        assert {code for _, code, *_ in refused} == {EngineBusy.code}


def test_flights_wait_out_a_busy_replica(run_dir: Path, start_host: StartHost) -> None:
    """Back-pressure is the flight's affair: two of them overfill the host, no prompt fails."""
    start_host(options={"delay_s": 0.01}, max_waiting=4, spec={"max_running": 4})
    with Flight(run_dir, MODEL) as one, Flight(run_dir, MODEL) as two:
        for flight in (one, two):
            flight.submit([ask(f"number {i}", i) for i in range(60)])
        answers: list[Answer] = []
        while one.in_flight or two.in_flight:
            answers += one.results(0.05) + two.results(0.05)
    assert len(answers) == 120
    assert all(isinstance(answer, Completion) for _, answer in answers)


def test_chat_overtakes_a_full_batch_lane(run_dir: Path, start_host: StartHost) -> None:
    """All batch slots are taken for good and the batch queue is full; chat is still answered."""
    host = start_host(options=FAULTS, max_waiting=10, spec={"max_running": 4})
    with RawClient(host.socket) as batch:
        batch.send(wire.Submit([ask("[[echo:hang]]", i) for i in range(50)], "whole", "batch"))
        assert len(batch.expect(wire.Failed).items) == 50 - 3 - 10
        client = EngineClient(run_dir, MODEL)
        for number in range(5):
            assert client.complete(ask(f"chat {number}"), timeout_s=PATIENCE_S).text
        [status] = client.replicas()
        assert status.running >= 3
        client.close()


def test_abort_frees_the_slot_and_is_not_answered(start_host: StartHost) -> None:
    """Running and waiting prompts can be taken back; what comes next is answered."""
    host = start_host(options=FAULTS, spec={"max_running": 1})
    with RawClient(host.socket) as client:
        for mode in ("whole", "stream"):
            client.send(wire.Submit([ask("[[echo:hang]]", i) for i in (1, 2)], mode, "chat"))
            client.send(wire.Abort([1, 2, 77]))
            client.send(wire.Submit([ask("next", 3)], "whole", "chat"))
            assert [i for i, _ in client.expect(wire.Done).items] == [3]


def test_ping_is_answered_with_the_load(start_host: StartHost) -> None:
    """Running and waiting, as they are."""
    host = start_host(options=FAULTS, spec={"max_running": 2})
    with RawClient(host.socket) as client:
        client.expect(wire.Load)
        client.send(wire.Submit([ask("[[echo:hang]]", i) for i in range(5)], "whole", "chat"))
        client.send(wire.Ping())
        assert client.expect(wire.Load) == wire.Load(running=2, waiting=3)


def test_an_abandoned_client_frees_its_slots(start_host: StartHost) -> None:
    """Everything a vanished client asked for is aborted, so others get the engine."""
    host = start_host(options=FAULTS, spec={"max_running": 2})
    for mode in ("whole", "stream"):
        with RawClient(host.socket) as gone:
            gone.send(wire.Submit([ask("[[echo:hang]]", i) for i in range(9)], mode, "chat"))
            gone.send(wire.Ping())
            gone.expect(wire.Load)
        with RawClient(host.socket) as client:
            client.send(wire.Submit([ask("mine", 1)], "whole", "chat"))
            assert client.expect(wire.Done).items[0][1].text == "mine"


def test_a_client_that_stops_reading_is_dropped_and_blocks_nobody(start_host: StartHost) -> None:
    """40 MB of answers for a client that never reads them; another one is served meanwhile."""
    host = start_host(spec={"max_running": 64, "session_len": 10**9})
    text = "x" * 200_000
    with RawClient(host.socket) as deaf, RawClient(host.socket) as other:

        def overfill() -> None:
            for batch in range(20):
                other.send(wire.Submit([ask("still served", batch)], "whole", "batch"))
                assert other.expect(wire.Done).items[0][0] == batch
                prompts = [ask(text, batch * 10 + i) for i in range(10)]
                deaf.send(wire.Submit(prompts, "whole", "batch"))
            for _ in range(20):
                deaf.expect(wire.Done)

        with pytest.raises(OSError, match=r"hung up|[Bb]roken pipe|reset"):
            overfill()
        other.send(wire.Submit([ask("and after", 99)], "whole", "batch"))
        assert other.expect(wire.Done).items[0][1].text == "and after"


def test_a_handle_aborts_its_stream(run_dir: Path, start_host: StartHost) -> None:
    """on_end comes once, with RequestAborted, and the slot is free again."""
    start_host(options={"token_delay_s": 0.05}, spec={"max_running": 1})
    client = EngineClient(run_dir, MODEL)
    stream = Stream(client, "word " * 1000)
    assert stream.first.wait(PATIENCE_S)
    stream.handle.abort()
    stream.handle.abort()
    assert isinstance(stream.result(), RequestAborted)
    assert client.complete(ask("free again"), timeout_s=PATIENCE_S).text == "free again"
    client.close()
    assert len(stream.ends) == 1


def test_a_stream_is_told_at_once_when_the_gpu_is_lent(run_dir: Path) -> None:
    """It need not wait as for a model that is being loaded, and the reason is passed on."""
    Standby(run_dir, MODEL).begin("GPU 0 is lent to fine-tune ftjob-1")
    client = EngineClient(run_dir, MODEL, wait_s=3600, standby_wait_s=3600)
    error = Stream(client, "anyone?").result()
    assert isinstance(error, GpuLent)
    assert error.message == "GPU 0 is lent to fine-tune ftjob-1; try again in a while"
    client.close()


def test_complete_gives_up_after_its_time(run_dir: Path, start_host: StartHost) -> None:
    """A hanging engine ends in RequestTimedOut, and the prompt is taken back."""
    start_host(options=FAULTS, spec={"max_running": 1})
    client = EngineClient(run_dir, MODEL)
    with pytest.raises(RequestTimedOut):
        client.complete(ask("[[echo:hang]]"), timeout_s=0.3)
    assert client.complete(ask("next"), timeout_s=PATIENCE_S).text == "next"
    client.close()


def test_without_a_replica_a_stream_ends_as_unavailable(run_dir: Path) -> None:
    """After wait_s, not before, and not never."""
    client = EngineClient(run_dir, MODEL, wait_s=0.3)
    assert isinstance(Stream(client, "anyone?").result(), EngineUnavailable)
    client.close()


def test_a_stream_waits_for_a_replica_that_is_starting(
    run_dir: Path, start_host: StartHost
) -> None:
    """Within wait_s a new socket is found and used."""
    client = EngineClient(run_dir, MODEL, wait_s=PATIENCE_S)
    stream = Stream(client, "early bird")
    start_host(ready=False)
    assert stream.result() is None
    client.close()


def test_closing_the_client_ends_its_streams(run_dir: Path, start_host: StartHost) -> None:
    """Nobody is left waiting for a callback."""
    start_host(options=FAULTS)
    client = EngineClient(run_dir, MODEL)
    streams = [Stream(client, "[[echo:hang]]", i) for i in range(3)]
    client.close()
    assert [type(stream.result()) for stream in streams] == [EngineUnavailable] * 3


def test_two_replicas_share_the_load_least_busy_first(run_dir: Path, start_host: StartHost) -> None:
    """With one replica full of hanging prompts, the work goes to the other, evenly before that."""
    for replica in (0, 1):
        start_host(replica, options=FAULTS, spec={"max_running": 8})
    client = EngineClient(run_dir, MODEL)
    wait_for(lambda: len(client.replicas()) == 2, "both replicas")
    hanging = [Stream(client, "[[echo:hang]]", i) for i in range(8)]
    wait_for(lambda: sum(r.running for r in client.replicas()) == 8, "all to run")
    assert [replica.running for replica in client.replicas()] == [4, 4]
    with Flight(run_dir, MODEL) as flight:
        wait_for(lambda: flight.results(0.05) == [] and probe(flight) == 2, "both replicas")
        flight.submit([ask("[[echo:hang]]", i) for i in range(4)])
        wait_for(lambda: sum(r.running for r in client.replicas()) == 12, "all to run")
        assert sorted(replica.running for replica in client.replicas()) == [6, 6]
    client.close()
    assert all(stream.ended.is_set() for stream in hanging)


def probe(flight: Flight) -> int:
    """Let a flight look around, and say how many replicas it has found."""
    flight.submit([])
    return flight.connected


def test_a_flight_can_drop_its_work_and_go_on(run_dir: Path, start_host: StartHost) -> None:
    """After abort the same ids can be used again and only the new answers come."""
    start_host(options=FAULTS, spec={"max_running": 2})
    with Flight(run_dir, MODEL) as flight:
        flight.submit([ask("[[echo:hang]]", i) for i in range(10)])
        flight.abort()
        assert flight.in_flight == 0
        flight.submit([ask("again", i) for i in range(10)])
        answers = everything(flight)
    assert {getattr(answer, "text", None) for answer in answers.values()} == {"again"}


def test_large_prompts_are_on_their_way_when_submit_returns(
    run_dir: Path, start_host: StartHost
) -> None:
    """The caller may be busy for long before it looks again; the engine has all of them."""
    start_host(options=FAULTS, spec={"max_running": 64})
    image = Image(bytes(1024 * 1024))
    turns = [Turn("user", [0, "[[echo:hang]]"])]
    client = EngineClient(run_dir, MODEL)
    wait_for(lambda: len(client.replicas()) == 1, "the replica")
    with Flight(run_dir, MODEL) as flight:
        flight.look(PATIENCE_S)
        flight.submit([Prompt(i, turns, Sampling(), [image]) for i in range(40)])
        # The flight is not asked again, so what it has not sent by now it never sends.
        wait_for(lambda: client.replicas()[0].running == 40, "all to run")
    client.close()


def test_tiles_cut_for_another_model_come_back_as_such(
    run_dir: Path, start_host: StartHost
) -> None:
    """So that a batch does the chunk again, and a chat is told to."""
    start_host(options={"tiling": {"tile_px": 8}})
    turns = [Turn("user", [0, "x"])]
    images = [Image(bytes(8 * 8 * 3), "tiles", 8, 8, tile_px=side) for side in (8, 4)]
    with Flight(run_dir, MODEL) as flight:
        flight.look(PATIENCE_S)
        assert flight.tiling == Tiling(8)
        flight.submit([Prompt(i, turns, Sampling(), [image]) for i, image in enumerate(images)])
        answers = everything(flight)
    assert isinstance(answers[0], Completion)
    assert isinstance(answers[1], ImagesCutOtherwise)
    assert answers[1].retryable


def test_a_flight_keeps_to_its_window(run_dir: Path, start_host: StartHost) -> None:
    """No more than ``window`` prompts are with the engines at once."""
    host = start_host(options=FAULTS, spec={"max_running": 64})
    with Flight(run_dir, MODEL, window=5) as flight, RawClient(host.socket) as watcher:
        assert flight.room == 5
        flight.submit([ask("[[echo:hang]]", i) for i in range(20)])
        wait_for(lambda: probe(flight) == 1, "the replica")
        assert flight.room == 0
        wait_for(lambda: loaded(watcher) >= 5, "the window to fill")
        flight.results(0.2)
        assert loaded(watcher) == 5


def loaded(watcher: RawClient) -> int:
    """How many prompts a host has."""
    watcher.send(wire.Ping())
    load = watcher.expect(wire.Load)
    return load.running + load.waiting


def test_a_host_of_another_protocol_version_is_refused(
    run_dir: Path, start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client keeps away from it instead of misreading it."""
    start_host()
    monkeypatch.setattr("workers.inference.engines.replicas.VERSION", wire.VERSION + 1)
    client = EngineClient(run_dir, MODEL, wait_s=0.5)
    assert isinstance(Stream(client, "hello?").result(), EngineUnavailable)
    client.close()


def test_a_client_works_on_both_sides_of_a_fork(run_dir: Path, start_host: StartHost) -> None:
    """The child makes its own thread and connections and leaves its parent's alone."""
    start_host()
    program = f"""
import os, sys
from pathlib import Path
from tests.contract.hosts import MODEL, ask
from workers.inference.engines.client import EngineClient

client = EngineClient(Path({str(run_dir)!r}), MODEL)
assert client.complete(ask("before"), timeout_s=20).text == "before"
child = os.fork()
text = "parent" if child else "child"
assert client.complete(ask(text), timeout_s=20).text == text
client.close()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0
