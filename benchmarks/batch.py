"""Items per second of a batch, beside a plain Celery application doing the same job.

The two take turns in one run on one machine. vlmq's time runs from ``POST /v1/batches`` until
``GET`` says ``completed``, when the output file is fsynced under its name: it includes planning,
validation of every line, leases and joining the shards. Celery's runs from the first message
until its output file is fsynced.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.http_batches import BatchClient, run_to_end
from benchmarks.items import check_output, write_input
from benchmarks.nodes import echo_node, warm_up
from benchmarks.plain_celery import PlainCelery, plain_celery
from benchmarks.report import Figure, Target
from benchmarks.scale import Scale

_LIMIT_S = 600.0
_RATIO = Target(">=", 50)


def measure(scale: Scale) -> list[Figure]:
    """Run both in turn and compare the medians."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        plain_celery() as plain,
        echo_node() as node,
        BatchClient(node.base_url) as client,
    ):
        folder = Path(name)
        warm_up(client, folder)
        source = folder / "input.jsonl"
        write_input(source, scale.items)
        start = time.perf_counter()
        file_id = client.upload(source)
        upload_s = time.perf_counter() - start
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(scale.rounds):
            ours.append(scale.items / _run_ours(client, file_id, scale.items))
            theirs.append(scale.plain_items / _run_plain(plain, folder, scale.plain_items))
    return _figures(ours, theirs, scale.items / upload_s)


def _run_ours(client: BatchClient, file_id: str, items: int) -> float:
    elapsed_s, batch = run_to_end(client, file_id, _LIMIT_S)
    check_output(client.output_lines(batch["output_file_id"]), items)
    return elapsed_s


def _run_plain(plain: PlainCelery, folder: Path, items: int) -> float:
    source, output = folder / "plain.jsonl", folder / "plain.out"
    write_input(source, items)
    elapsed_s = plain.run(source, output)
    with open(output, "rb") as lines:
        check_output(iter(lines), items)
    return elapsed_s


def _figures(ours: Sequence[float], theirs: Sequence[float], upload: float) -> list[Figure]:
    rate, plain_rate = statistics.median(ours), statistics.median(theirs)
    with_upload = 1 / (1 / rate + 1 / upload)
    return [
        Figure("batch", "vlmq", rate, "items/s", None, f"median of {_listed(ours)}"),
        Figure(
            "batch", "plain Celery", plain_rate, "items/s", None, f"median of {_listed(theirs)}"
        ),
        Figure("batch", "vlmq / plain Celery", rate / plain_rate, "times", _RATIO),
        Figure(
            "batch",
            "the same, upload included",
            with_upload / plain_rate,
            "times",
            None,
            f"upload alone {upload:,.0f} items/s",
        ),
    ]


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:,.0f}" for rate in rates)
