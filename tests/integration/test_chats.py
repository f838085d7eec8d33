"""Chat requests between API and consumer on a real Valkey: claims, events, lost consumers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared import chats
from shared.chats import ChatDesk, ChatEnd, ChatEvent, ChatJob, ChatReply
from shared.errors import (
    ContextLengthExceeded,
    EngineCrashed,
    ModelUnavailable,
    QueueUnavailable,
    RateLimited,
    RequestTimedOut,
    VlmqError,
)
from shared.presence import NodeReport, ReplicaReport
from shared.queue import chat_queue
from shared.stores import Stores
from tests.conftest import connected, store_settings
from tests.running_node import wait_for

LIMIT_S = 15.0


@pytest.fixture
def stores(own_stores: Stores) -> Stores:
    """The API's side, which knows of a ready replica."""
    serve(own_stores)
    return own_stores


@pytest.fixture
def desk(redis_url: str, tmp_path: Path) -> Iterator[ChatDesk]:
    """The consumer's side."""
    with connected(store_settings(redis_url, tmp_path)) as own:
        found = ChatDesk(own.redis)
        yield found
        found.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking after a silent consumer takes a moment, not seconds."""
    monkeypatch.setattr(chats, "_CHECK_AFTER_S", 0.05)


def serve(stores: Stores) -> None:
    """Say that a replica of ``m`` is ready."""
    replicas = [ReplicaReport("m", 0, "ready")]
    stores.presence.announce(NodeReport("n", int(time.time()), replicas), ttl_s=60)


def submit(stores: Stores, *, timeout_s: float = 60) -> ChatReply:
    """Submit a request."""
    return stores.chats.submit(owner="ann", model="m", body=b"{}", timeout_s=timeout_s)


def take(desk: ChatDesk, reply: ChatReply, consumer: str = "c1") -> ChatJob:
    """Claim the request of a reply."""
    job = desk.take(reply.id)
    assert job is not None
    send(desk, job, "claimed", consumer)
    return job


def send(desk: ChatDesk, job: ChatJob, kind: str, text: str = "") -> None:
    """Send an event."""
    desk.send(job.inbox, ChatEvent(job.id, job.submission, kind, text))  # type: ignore[arg-type]


def read(reply: ChatReply, until: Callable[[str], bool] = lambda _: False) -> str:
    """The text up to the end, or until it satisfies ``until``."""
    text = ""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        event = reply.next(0.02)
        if isinstance(event, ChatEnd):
            return text
        text += event or ""
        if until(text):
            return text
    raise AssertionError(f"no end after {text!r}")


def failure(reply: ChatReply) -> VlmqError:
    """The error that ends a reply."""
    with pytest.raises(VlmqError) as failed:
        read(reply)
    return failed.value


def tickets(stores: Stores) -> int:
    """How many tickets wait."""
    return stores.tickets.waiting(chat_queue("m"))


# --- the usual way ----------------------------------------------------------------------------


def test_an_answer_comes_back_in_order(stores: Stores, desk: ChatDesk) -> None:
    """However its pieces are joined on the way."""
    reply = submit(stores)
    assert tickets(stores) == 1
    job = take(desk, reply)
    words = [f"w{number} " for number in range(500)]
    for word in words:
        send(desk, job, "delta", word)
    send(desk, job, "end", "stop")
    assert read(reply) == "".join(words)


def test_many_answers_do_not_mix(stores: Stores, desk: ChatDesk) -> None:
    """All share one inbox and one writer."""
    replies = [submit(stores) for _ in range(20)]
    jobs = [take(desk, reply) for reply in replies]
    for word in range(50):
        for number, job in enumerate(jobs):
            send(desk, job, "delta", f"{number}.{word} ")
    for job in jobs:
        send(desk, job, "end", "stop")
    for number, reply in enumerate(replies):
        assert read(reply) == "".join(f"{number}.{word} " for word in range(50))


def test_an_error_is_raised_as_what_it_was(stores: Stores, desk: ChatDesk) -> None:
    """With its code, message and parameter."""
    reply = submit(stores)
    job = take(desk, reply)
    event = ChatEvent(
        job.id, 1, "error", "too long", code="context_length_exceeded", param="messages"
    )
    desk.send(job.inbox, event)
    error = failure(reply)
    assert isinstance(error, ContextLengthExceeded)
    assert (error.message, error.param) == ("too long", "messages")


def test_duplicate_tickets_are_harmless(stores: Stores, desk: ChatDesk) -> None:
    """The second finds nothing to take."""
    reply = submit(stores)
    stores.tickets.chat("m", reply.id)
    take(desk, reply)
    assert desk.take(reply.id) is None
    assert desk.take("chatcmpl-of-nobody") is None


def test_events_that_were_written_twice_are_read_once(stores: Stores, desk: ChatDesk) -> None:
    """A consumer whose answer from Redis was lost writes them again."""
    reply = submit(stores)
    job = take(desk, reply)
    send(desk, job, "delta", "once")
    assert read(reply, lambda text: text == "once") == "once"
    entries = stores.redis.xrange(job.inbox)
    for _, fields in entries:
        stores.redis.xadd(job.inbox, fields)
    send(desk, job, "end", "stop")
    assert read(reply) == ""


# --- going away -------------------------------------------------------------------------------


def test_a_request_that_was_withdrawn_is_never_run(stores: Stores, desk: ChatDesk) -> None:
    """Its client went away before anybody took it."""
    reply = submit(stores)
    reply.abort()
    assert desk.take(reply.id) is None


def test_the_consumer_hears_of_clients_that_went_away(stores: Stores, desk: ChatDesk) -> None:
    """And stops its work."""
    heard: list[str] = []
    threading.Thread(target=desk.watch_aborts, args=(heard.append,), daemon=True).start()
    wait_for(
        lambda: stores.redis.pubsub_numsub(chats.ABORTS)[0][1] == 1, "the subscription", LIMIT_S
    )
    reply = submit(stores)
    take(desk, reply)
    reply.abort()
    reply.abort()
    wait_for(lambda: bool(heard), "the abort", LIMIT_S)
    assert heard == [reply.id]


def test_a_deadline_ends_the_wait(stores: Stores, desk: ChatDesk) -> None:
    """Explicitly, and nobody runs it afterwards."""
    reply = submit(stores, timeout_s=0.3)
    assert isinstance(failure(reply), RequestTimedOut)
    assert desk.take(reply.id) is None


def test_ends_are_told_once_however_many_threads_tell_them(stores: Stores) -> None:
    """Each is told; the inbox's thread and those of new requests do not fall over one another."""
    count, told = 20_000, list[str]()

    def tell() -> None:
        while len(told) < count:
            with stores.chats._ended_ids() as ended:
                told.extend(ended)

    with ThreadPoolExecutor(4) as threads:
        telling = [threads.submit(tell) for _ in range(4)]
        for number in range(count):
            stores.chats.forget(f"{number:05}")
        for one in telling:
            one.result(LIMIT_S)
    assert sorted(told) == [f"{number:05}" for number in range(count)]


def test_what_was_read_does_not_stay_in_redis(
    stores: Stores, desk: ChatDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the streams of a busy server would take hundreds of megabytes."""
    monkeypatch.setattr(chats, "_TRIM_EVERY_S", 0.01)
    reply = submit(stores)
    job = take(desk, reply)
    for number in range(300):
        word = f"{number:5000d} "
        send(desk, job, "delta", word)
        assert read(reply, lambda text, word=word: text == word) == word  # type: ignore[misc]
    assert stores.redis.xlen(job.inbox) < 100
    send(desk, job, "end", "stop")
    assert read(reply) == ""


# --- limits -----------------------------------------------------------------------------------


def test_without_a_ready_replica_nothing_waits(own_stores: Stores) -> None:
    """The client is told at once."""
    with pytest.raises(ModelUnavailable) as refused:
        submit(own_stores)
    assert refused.value.retryable
    assert tickets(own_stores) == 0


def test_a_model_that_some_node_can_load_is_waited_for(own_stores: Stores) -> None:
    """Its replicas are unloaded, and the node says that a request brings it."""
    replicas = [ReplicaReport("m", 0, "unloaded")]
    report = NodeReport("n", int(time.time()), replicas, obtainable=["m"])
    own_stores.presence.announce(report, ttl_s=60)
    submit(own_stores)
    assert tickets(own_stores) == 1


def test_more_than_may_be_open_are_refused(redis_url: str, tmp_path: Path) -> None:
    """Until one has ended."""
    settings = store_settings(redis_url, tmp_path, api={"max_waiting_chats": 2})
    with connected(settings) as stores:
        serve(stores)
        first, _ = submit(stores), submit(stores)
        with pytest.raises(RateLimited):
            submit(stores)
        first.abort()
        submit(stores)


def test_without_redis_the_client_is_told(tmp_path: Path) -> None:
    """And nothing is kept of the request."""
    away = store_settings(f"unix://{tmp_path}/nobody.sock", tmp_path)
    with connected(away) as cut_off, pytest.raises(QueueUnavailable):
        submit(cut_off)


# --- consumers that vanish --------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_a_lost_ticket_is_published_again(stores: Stores) -> None:
    """While the request still waits."""
    reply = submit(stores)
    stores.redis.delete("vlmq:celery:chat.m")
    wait_for(lambda: not reply.next(0.05) and tickets(stores) > 0, "a ticket", LIMIT_S)


@pytest.mark.usefixtures("impatient")
def test_a_consumer_that_died_before_its_first_word_is_replaced(
    stores: Stores, desk: ChatDesk
) -> None:
    """Once; what the first one says after all is not heard."""
    reply = submit(stores)
    first = take(desk, reply, "dead")
    wait_for(lambda: not reply.next(0.05) and tickets(stores) == 2, "the second ticket", LIMIT_S)
    second = take(desk, reply, "alive")
    assert (first.submission, second.submission) == (1, 2)
    stores.presence.consumer_beat("alive")
    send(desk, first, "delta", "ghost")
    send(desk, first, "end", "stop")
    send(desk, second, "delta", "answer")
    send(desk, second, "end", "stop")
    assert read(reply) == "answer"


@pytest.mark.usefixtures("impatient")
def test_a_second_death_ends_the_request(stores: Stores, desk: ChatDesk) -> None:
    """A request that kills consumers must not kill them all."""
    reply = submit(stores)
    take(desk, reply, "dead")
    wait_for(lambda: not reply.next(0.05) and tickets(stores) == 2, "the second ticket", LIMIT_S)
    take(desk, reply, "dead too")
    assert isinstance(failure(reply), EngineCrashed)


@pytest.mark.usefixtures("impatient")
def test_after_the_first_word_a_death_ends_the_request(stores: Stores, desk: ChatDesk) -> None:
    """The client must not read a beginning twice."""
    reply = submit(stores)
    send(desk, take(desk, reply, "dead"), "delta", "half")
    assert read(reply, lambda text: text == "half") == "half"
    error = failure(reply)
    assert isinstance(error, EngineCrashed)
    assert tickets(stores) == 1


@pytest.mark.usefixtures("impatient")
def test_one_taken_without_a_word_is_submitted_again(stores: Stores, desk: ChatDesk) -> None:
    """Its consumer died between taking it and saying so."""
    reply = submit(stores)
    assert desk.take(reply.id) is not None
    wait_for(lambda: not reply.next(0.05) and tickets(stores) == 2, "the second ticket", LIMIT_S)


@pytest.mark.usefixtures("impatient")
def test_a_silent_consumer_that_lives_is_left_alone(stores: Stores, desk: ChatDesk) -> None:
    """Long thinking is no death, and neither is one missed look."""
    reply = submit(stores)
    job = take(desk, reply, "slow")
    stores.presence.consumer_beat("slow")
    for _ in range(20):
        assert reply.next(0.02) is None
    stores.redis.delete("vlmq:consumer:slow")
    for _ in range(4):
        assert reply.next(0.02) is None
    stores.presence.consumer_beat("slow")
    for _ in range(20):
        assert reply.next(0.02) is None
    assert tickets(stores) == 1
    send(desk, job, "end", "stop")
    assert read(reply) == ""


def test_requests_survive_the_wire(stores: Stores, desk: ChatDesk) -> None:
    """The body comes out as the bytes that went in."""
    body = bytes(range(256)) * 100
    reply = stores.chats.submit(owner="ann", model="m", body=body, timeout_s=60)
    job = desk.take(reply.id)
    assert job is not None
    assert (job.body, job.owner, job.model) == (body, "ann", "m")
    assert job.submission == 1
