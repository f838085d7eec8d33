"""The rows of vlmq: a whole node, asked over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu import chats
from benchmarks.gpu.nodes import prepared_node, start
from benchmarks.gpu.results import FirstTokens, Load, Scaling, Throughput
from benchmarks.gpu.session import Session
from benchmarks.gpu.setups import setup_of
from benchmarks.gpu.watch import watching
from benchmarks.gpu.work import (
    NEW_TOKENS,
    PROMPT,
    WORKS,
    Expected,
    check_answers,
    item_lines,
    write_input,
)
from benchmarks.http_batches import BatchClient
from tests.running_node import RunningNode, wait_for

_LOAD_LIMIT_S = 240.0
_ROW_LIMIT_S = 180.0
_WARM_UP_CHATS = 3
_BUSY_AFTER = 0.05
"""The share of the batch that is done when the GPU is taken to be busy."""


class _Node:
    """A started node and who asks it."""

    def __init__(
        self, session: Session, backend: str, gpus: Sequence[str], node: RunningNode
    ) -> None:
        self.session = session
        self.backend = backend
        self.gpus = gpus
        self.node = node
        self.client = BatchClient(node.base_url)

    def batch(self, row: str, items: int) -> Throughput:
        """Run one batch to its end and check every answer."""
        source = self._input(row, items)
        began = time.perf_counter()
        file_id = self.client.upload(source)
        upload_s = time.perf_counter() - began
        source.unlink()
        with watching(self.node, self.gpus) as usage:
            began = time.perf_counter()
            batch = self._to_end(file_id)
            elapsed_s = time.perf_counter() - began
        expected = Expected(items, new_tokens(self.session))
        checked = check_answers(self.client.output_lines(batch["output_file_id"]), expected)
        return Throughput(
            self.backend,
            row,
            "ours",
            items,
            elapsed_s,
            checked.prompt_tokens,
            tiles=self.session.tiles(row),
            upload_s=upload_s,
            usage=usage,
        )

    def _to_end(self, file_id: str) -> dict[str, Any]:
        client = self.client
        batch_id = client.submit(file_id)
        try:
            batch = client.wait(batch_id, self.session.clock.limit(_ROW_LIMIT_S))
        except TimeoutError:
            client.cancel(batch_id)  # the next row shall not run beside it
            raise
        assert batch["status"] == "completed", (
            f"the batch ended {batch['status']}: {batch['errors']}"
        )
        failed = batch["error_file_id"]
        if failed is not None:
            first = next(client.output_lines(failed)).decode()
            raise AssertionError(f"{batch['request_counts']}, the first that failed: {first}")
        return batch

    def submit(self, row: str, items: int) -> str:
        """Start a batch and return its id."""
        return self.client.submit(self.client.upload(self._input(row, items)))

    def _input(self, row: str, items: int) -> Path:
        source = self.session.folder / f"{row}.jsonl"
        write_input(source, item_lines(self.session.photos_of(row), WORKS[row], items))
        return source


def new_tokens(session: Session) -> int:
    """How many tokens an answer has: the echo engine repeats the prompt."""
    return len(PROMPT.split()) if session.results.dry else NEW_TOKENS


def measure(session: Session, backend: str) -> None:
    """Start a node on the first GPU and measure every row."""
    gpus = session.gpus[:1]
    with session.step(f"{backend}, vlmq: load"):
        sections = setup_of(backend, gpus, session.changes)
        with prepared_node(sections, session.checkpoint, [session.photo_folder]) as node:
            load_s = start(node, session.clock.limit(_LOAD_LIMIT_S))
            replicas = node.settings.node.serve[0].replicas
            session.results.loads.append(Load(backend, "ours", replicas, load_s))
            session.clock.say(f"{backend}, vlmq: {replicas} replica(s) loaded in {load_s:.1f} s")
            asked = _Node(session, backend, gpus, node)
            for row in session.works():
                _row(asked, row)
            if not {"chat", "chat-busy"}.isdisjoint(session.rows):
                _chats(asked)
            if "chat-busy" in session.rows:
                _busy_chats(asked)


def measure_all_gpus(session: Session, backend: str) -> None:
    """Start a node on all GPUs and run the batch of 448 px, as large for each GPU."""
    count = len(session.gpus)
    if count < 2:
        session.note(f"{backend}: one GPU only, so nothing is said about several")
        return
    with session.step(f"{backend}, vlmq on {count} GPUs"):
        sections = setup_of(backend, session.gpus, session.changes)
        with prepared_node(sections, session.checkpoint, [session.photo_folder]) as node:
            start(node, session.clock.limit(_LOAD_LIMIT_S))
            asked = _Node(session, backend, session.gpus, node)
            sizes = session.scale.rows["448"]
            asked.batch("448", sizes.warm_up * count)
            entry = asked.batch("448", sizes.ours * count)
            replicas = node.settings.node.serve[0].replicas
            session.results.scalings.append(Scaling(backend, count, replicas, entry))
            session.clock.say(f"{backend}, vlmq on {count} GPUs: {entry.rate:.1f} img/s")


def _row(asked: _Node, row: str) -> None:
    session = asked.session
    sizes = session.scale.rows[row]
    with session.step(f"{asked.backend}, vlmq: {row}"):
        if sizes.warm_up:
            asked.batch(row, sizes.warm_up)
        entry = asked.batch(row, sizes.ours)
        session.results.throughputs.append(entry)
        session.clock.say(
            f"{asked.backend}, vlmq: {row} {entry.rate:.1f} img/s, "
            f"{msgspec.json.encode(entry.usage).decode()}"
        )


def _chats(asked: _Node) -> None:
    session = asked.session
    with session.step(f"{asked.backend}, vlmq: chat"):
        photos = session.photos_of("448")
        chats.first_token_times(asked.node.port, photos[-_WARM_UP_CHATS:], WORKS["448"])
        seconds = chats.first_token_times(
            asked.node.port, photos[: session.scale.chats], WORKS["448"]
        )
        session.results.first_tokens.append(FirstTokens(asked.backend, "ours", "idle", seconds))


def _busy_chats(asked: _Node) -> None:
    """Chats while a batch runs, which must still run when the last chat has ended."""
    session, client = asked.session, asked.client
    items = session.scale.busy_items
    with session.step(f"{asked.backend}, vlmq: chat beside a batch"):
        batch_id = asked.submit("448", items)

        def done() -> int:
            return int(client.batch(batch_id)["request_counts"]["completed"])

        limit_s = session.clock.limit(60)
        wait_for(lambda: done() > _BUSY_AFTER * items, "the batch to be under way", limit_s)
        before, began = done(), time.monotonic()
        photos = session.photos_of("448")[: session.scale.chats]
        seconds = chats.first_token_times(asked.node.port, photos, WORKS["448"])
        rate = (done() - before) / (time.monotonic() - began)
        status = client.batch(batch_id)["status"]
        session.results.first_tokens.append(
            FirstTokens(asked.backend, "ours", "busy", seconds, rate)
        )
        if status == "in_progress":
            client.cancel(batch_id)
            client.wait(batch_id, session.clock.limit(60))
        else:
            # The last of the chats were beside nothing, but the others were not.
            session.note(f"the batch was {status} before the chats were: raise --size busy_items")
