"""Nodes with several models, for tests: what they serve and what they say of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

from shared.presence import ReplicaReport
from tests.running_node import RunningNode, wait_for
from workers.inference.engines.client import EngineClient

LIMIT_S = 60.0
QUICK: dict[str, Any] = {
    "max_model_wait_s": 1,
    "min_resident_s": 1,
    "model_wait_s": 40,
    "engine_restart_s": 0.1,
}


def echo(model: str, *, options: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A model of the echo engine on GPU 0."""
    return {"model": model, "engine": "echo", "gpus": ["0"], "options": options or {}, **fields}


def on_demand(model: str, **fields: Any) -> dict[str, Any]:
    """One that is loaded when asked for."""
    return echo(model, load="on_demand", **fields)


def replicas(node: RunningNode, model: str) -> list[ReplicaReport]:
    """What the node says of a model's replicas."""
    return [
        replica
        for said in node.stores.presence.nodes()
        for replica in said.replicas
        if replica.model == model
    ]


def states(node: RunningNode, model: str) -> list[str]:
    """The states of a model's replicas."""
    return [replica.state for replica in replicas(node, model)]


def wait_for_states(node: RunningNode, model: str, *expected: str) -> None:
    """Wait until the replicas of a model are like this."""
    wait_for(
        lambda: states(node, model) == list(expected),
        f"{model} to be {expected}",
        LIMIT_S,
        lambda: f"{replicas(node, model)}\n{node.story()}",
    )


def in_engines(node: RunningNode, model: str) -> int:
    """How many prompts run or wait in a model's engines, by their own count."""
    client = EngineClient(node.settings.run_dir, model)
    try:
        wait_for(lambda: len(client.replicas()) > 0, "a replica", 20)
        return sum(replica.running + replica.waiting for replica in client.replicas())
    finally:
        client.close()


def ask(node: RunningNode, model: str, text: str = "are you there") -> str | None:
    """One chat; no second try hides a failure."""
    answer = node.sdk(max_retries=0).chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], timeout=LIMIT_S
    )
    return answer.choices[0].message.content


def story(node: RunningNode) -> str:
    """What the node told at its terminal."""
    return (node.folder / "node.log").read_text()


@dataclass
class Traffic:
    """Chats that go on until told to stop: how many were whole, and every failure."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, sdk: openai.OpenAI, model: str, words: list[str]) -> None:
        """One client, one stream after the other."""
        while not self._stopping.is_set():
            try:
                with sdk.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": " ".join(words)}],
                    stream=True,
                    timeout=LIMIT_S,
                ) as stream:
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            except openai.OpenAIError as error:
                self._note(f"{type(error).__name__}: {error}")
                continue
            self._note(None if text.split() == words else f"not whole: {text}")

    def _note(self, failure: str | None) -> None:
        with self._lock:
            if failure is None:
                self.answered += 1
            else:
                self.failures.append(failure)


@contextmanager
def traffic(node: RunningNode, model: str, *, clients: int = 4) -> Iterator[Traffic]:
    """Streams without a pause during a block; it begins once the first was answered."""
    kept = Traffic()
    words = [f"word{number}" for number in range(8)]
    threads = [
        threading.Thread(target=kept.run, args=(node.sdk(max_retries=0), model, words))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: kept.answered > 0, "the first answer", LIMIT_S, lambda: str(kept.failures))
        yield kept
    finally:
        kept._stopping.set()
        for thread in threads:
            thread.join(LIMIT_S)
