"""Batches with given answers on real stores and a real API, and ``vlmq batch export`` of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cli.main import run
from shared.chat import completion_body
from shared.errors import InvalidJson, VlmqError
from shared.jobs import Batch
from shared.leases import Lease
from shared.manifest import Manifest
from shared.shards import ShardHeader, shard_path, write_shard
from shared.stores import Stores
from tests.faults.batches import line
from tests.stored_batches import LANE, MODEL, jsonl, link_model, now, record, run_control
from workers.inference.batch_lines import error_line, item_id, output_line
from workers.inference.chunk_input import input_path, lines_of

OWNER = "local"
QUESTION = "What is it?"

Answer = str | VlmqError
Answers = Callable[[int], Answer]
"""From the number of a line to what became of it."""


def caption(number: int) -> str:
    """What lines are answered unless a test says otherwise."""
    return f"caption {number}, 猫 🐈"


def asking(custom_id: str, url: str, **body: Any) -> str:
    """A line that asks about one image."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return line(custom_id, content, **body)


def inline(data: bytes) -> str:
    """A ``data:`` URL."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def planned(stores: Stores, lines: Sequence[str]) -> Batch:
    """A batch whose chunks may be claimed."""
    link_model(stores)
    batch = record(stores, jsonl(lines), owner=OWNER)
    run_control(stores)
    return now(stores, batch)


def answered(stores: Stores, lines: Sequence[str], answers: Answers = caption) -> Batch:
    """A batch of these lines that has ended with these answers."""
    return worked_off(stores, planned(stores, lines), answers)


def worked_off(stores: Stores, batch: Batch, answers: Answers = caption) -> Batch:
    """The planned batch, with these answers, ended."""
    while (lease := stores.leases.claim(LANE, "w")) is not None:
        answer_chunk(stores, lease, answers)
    run_control(stores)
    return now(stores, batch)


def answer_chunk(stores: Stores, lease: Lease, answers: Answers = caption) -> None:
    """Write the shard of a chunk as a consumer does, and commit it; what is no JSON fails."""
    folder = stores.batches.folder(lease.batch_id)
    manifest = Manifest(folder)
    lines = lines_of(lease.spec, manifest, input_path(lease.spec, stores.layout))
    output, errors, failed = b"", b"", 0
    for one in lines(manifest.chunk(int(lease.unit))):
        custom_id, name = one.custom_id(), item_id(lease.batch_id, one.number)
        answer = InvalidJson() if custom_id is None else answers(one.number)
        if isinstance(answer, VlmqError):
            errors += error_line(name, custom_id, answer)
            failed += 1
        else:
            output += output_line(name, custom_id or "", _completion(name, answer))
    items = manifest.chunk(int(lease.unit)).items
    header = ShardHeader(len(output), len(errors), items - failed, failed, 0, 0)
    write_shard(shard_path(folder, int(lease.unit), lease.token), header, output, errors)
    stores.batches.committed(lease, header, [])


def _completion(name: str, answer: str) -> Any:
    text, cut, _ = answer.partition("[cut]")
    return completion_body(
        completion_id=f"chatcmpl-{name}",
        created=1,
        model=MODEL,
        text=text,
        finish_reason="length" if cut else "stop",
        prompt_tokens=7,
        completion_tokens=3,
    )


class Exporter:
    """Runs ``vlmq batch export`` in this process against one server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, batch: Batch, form: str, output: Path, *options: str) -> int:
        """The exit status."""
        command = ["batch", "export", batch.id, "--format", form, "-o", str(output)]
        return run([*command, "--url", self._url, *options])


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(text) for text in path.read_bytes().splitlines()]
