"""Chats in the middle of which something dies: each completes or ends with a clean error, soon."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from shared.process import parent_of
from tests.faults.batches import assert_nothing_left
from tests.fleets import in_engines
from tests.running_node import RunningNode, running_node, wait_for

pytestmark = pytest.mark.timeout(150)

STREAMS = 20
ENGINE_LIMIT_S = 10.0
"""An engine's death is seen at once; its restart takes a moment."""
CONSUMER_LIMIT_S = 25.0
"""A consumer's death is seen when its sign of life runs out."""
ECHO = {
    "model": "echo",
    "engine": "echo",
    "max_running": 64,
    "options": {"token_delay_s": 0.1, "faults": True},
}
NODE = {"engine_restart_s": 0.1, "engine_wait_s": 15, "chat_threads": 64}
QUEUE = {"lease_ttl_s": 6, "renew_s": 2, "reap_s": 0.5, "drain_s": 5}
LONG = " ".join(f"word{number}" for number in range(100))
"""Takes ten seconds, so that a slow machine has time to break something meanwhile."""


@pytest.fixture(scope="module")
def node() -> Iterator[RunningNode]:
    """A node with a slow engine; every test leaves it as it was."""
    with running_node(models=(ECHO,), node=NODE, queue=QUEUE) as running:
        yield running
    assert_nothing_left(running)


@pytest.fixture(autouse=True)
def _well_afterwards(node: RunningNode) -> Iterator[None]:
    """Whatever happened, the next chat is answered and nothing stays open or running."""
    yield
    wait_for(lambda: answers(node), "the node to be well again", 30)
    wait_for(lambda: node.stores.redis.zcard("vlmq:chats") == 0, "every chat to be closed", 20)
    wait_for(lambda: in_engines(node, "echo") == 0, "the engine to be idle", 20)


def answers(node: RunningNode) -> bool:
    """Whether a chat is answered."""
    try:
        text = ask(node.sdk(max_retries=0), "well again").choices[0].message.content
    except openai.APIError:
        return False
    return text == "well again"


def ask(sdk: openai.OpenAI, text: str) -> openai.types.chat.ChatCompletion:
    """One chat."""
    return sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}])


class Stream:
    """One streamed chat, read in a thread of its own."""

    def __init__(self, sdk: openai.OpenAI, text: str) -> None:
        self.text = ""
        self.error: Exception | None = None
        self.finish_reason: str | None = None
        self.begun = threading.Event()
        self._sdk = sdk
        self._asked = text
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, limit_s: float) -> None:
        """Until it ended, one way or the other."""
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), f"no end after {limit_s} s, {len(self.text)} read"

    def _read(self) -> None:
        try:
            for chunk in self._sdk.chat.completions.create(
                model="echo",
                messages=[{"role": "user", "content": self._asked}],
                stream=True,
            ):
                self.text += chunk.choices[0].delta.content or ""
                self.finish_reason = chunk.choices[0].finish_reason
                if self.text:
                    self.begun.set()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def opened(node: RunningNode, texts: list[str], *, begun: bool) -> list[Stream]:
    """Streams that all run in the engine, with a word read or with none."""
    sdk = node.sdk(max_retries=0)
    streams = [Stream(sdk, text) for text in texts]
    if begun:
        assert all(stream.begun.wait(60) for stream in streams)
    else:
        wait_for(lambda: in_engines(node, "echo") == len(texts), "all streams to run", 60)
    return streams


def assert_clean_end(stream: Stream) -> None:
    """Half an answer, then an error that the SDK understands."""
    assert isinstance(stream.error, openai.APIError), stream.error
    assert stream.error.code == "engine_crashed"
    assert LONG.startswith(stream.text)
    assert stream.text != ""


def chat_consumer(node: RunningNode) -> int:
    """The process that serves chats."""
    consumers = node.pids("workers.consumer chat")
    [found] = [pid for pid in consumers if parent_of(pid) not in consumers]
    return found


def test_an_engine_killed_under_20_streams_ends_each_cleanly(node: RunningNode) -> None:
    """What was half answered is not begun again."""
    streams = opened(node, [LONG] * STREAMS, begun=True)
    [victim] = node.engine_pids()
    os.kill(victim, signal.SIGKILL)
    for stream in streams:
        stream.wait(ENGINE_LIMIT_S)
        assert_clean_end(stream)


def test_streams_without_a_word_yet_are_answered_after_all(node: RunningNode) -> None:
    """By the engine that takes the dead one's place; the clients notice nothing."""
    texts = [f"[[echo:sleep=5]]{number}" for number in range(STREAMS)]
    streams = opened(node, texts, begun=False)
    [victim] = node.engine_pids()
    os.kill(victim, signal.SIGKILL)
    for stream, text in zip(streams, texts, strict=True):
        stream.wait(CONSUMER_LIMIT_S)
        assert (stream.error, stream.text, stream.finish_reason) == (None, text, "stop")


def test_a_poisonous_chat_fails_alone(node: RunningNode) -> None:
    """It is not retried for ever; one that waits beside it is answered."""
    [neighbour] = opened(node, ["[[echo:sleep=2]]neighbour"], begun=False)
    with pytest.raises(openai.InternalServerError) as failed:
        ask(node.sdk(max_retries=0), "[[echo:kill]]")
    assert failed.value.code in {"engine_crashed", "engine_unavailable"}
    neighbour.wait(ENGINE_LIMIT_S + 10)
    assert neighbour.error is None or isinstance(neighbour.error, openai.APIError)


def test_kill_9_of_the_chat_consumer(node: RunningNode) -> None:
    """Half-answered streams end cleanly, waiting ones are answered by the next consumer."""
    begun = opened(node, [LONG] * 5, begun=True)
    texts = [f"[[echo:sleep=4]]{number}" for number in range(5)]
    sdk = node.sdk(max_retries=0)
    waiting = [Stream(sdk, text) for text in texts]
    wait_for(lambda: in_engines(node, "echo") == 10, "all to run", 20)
    os.kill(chat_consumer(node), signal.SIGKILL)
    for stream in begun:
        stream.wait(CONSUMER_LIMIT_S)
        assert_clean_end(stream)
    for stream, text in zip(waiting, texts, strict=True):
        stream.wait(CONSUMER_LIMIT_S)
        assert (stream.error, stream.text) == (None, text)


def test_sigterm_lets_the_chat_consumer_finish(node: RunningNode) -> None:
    """What it has in hand is answered to the end."""
    streams = opened(node, [" ".join(["word"] * 30)] * 5, begun=True)
    os.kill(chat_consumer(node), signal.SIGTERM)
    for stream in streams:
        stream.wait(ENGINE_LIMIT_S)
        assert (stream.error, stream.text) == (None, " ".join(["word"] * 30))


def test_kill_9_of_valkey_in_the_middle_of_streams(node: RunningNode) -> None:
    """Not a word is lost or heard twice."""
    streams = opened(node, [LONG] * 5, begun=True)
    os.kill(node.redis_pid(), signal.SIGKILL)
    for stream in streams:
        stream.wait(CONSUMER_LIMIT_S)
        assert (stream.error, stream.text, stream.finish_reason) == (None, LONG, "stop")


def test_the_engine_stops_for_clients_that_went_away(node: RunningNode) -> None:
    """Streamed or not."""
    streams = []
    for _ in range(5):
        chunks = node.sdk(max_retries=0).chat.completions.create(
            model="echo", messages=[{"role": "user", "content": LONG * 5}], stream=True
        )
        streams.append(chunks)
        next(iter(chunks))

    def impatient(_: int) -> None:
        body = {"model": "echo", "messages": [{"role": "user", "content": LONG * 5}]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{node.base_url}/chat/completions", json=body, timeout=1.0)

    started = time.monotonic()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(impatient, range(5)))
    assert in_engines(node, "echo") >= 5
    for chunks in streams:
        chunks.close()
    wait_for(lambda: in_engines(node, "echo") == 0, "the engine to stop", 10)
    assert time.monotonic() - started < len(LONG.split()) * 5 * 0.05, "they ended by themselves"
