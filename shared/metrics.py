"""Every metric of vlmq, in one table, and the counters that are kept in Redis.

Counters live in one Redis hash, ``vlmq:metrics``, so that they go on over restarts and are the same
whichever API process is asked. A field is a metric's name and its labels' values, joined by ``|``,
which no model's name and no error's code holds. The Lua scripts count in the very step that they
count of, hence exactly once; what the API sees of chats is summed up here and sent with commands
that are sent anyway. Wiped with Redis, counters begin at zero, which Prometheus takes for a restart.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import msgspec

from shared.connection import PREFIX
from shared.errors import QueueUnavailable

KEY = f"{PREFIX}metrics"
"""The hash of counters."""
SEPARATOR = "|"
MICROSECONDS = 1_000_000

_SUM = "sum_us"
_INF = "+Inf"


class Metric(msgspec.Struct, frozen=True, eq=False):
    """One metric. ``known`` names labels whose values are few and known, so that zeros are shown.

    ``buckets`` are a histogram's upper bounds in seconds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    known: dict[str, tuple[str, ...]] = {}
    buckets: tuple[float, ...] = ()


# --- batches ----------------------------------------------------------------------------------

CHUNKS_WAITING = Metric(
    "vlmq_batch_chunks_waiting",
    "gauge",
    "Chunks of running batches that no worker holds, those postponed after trouble included",
    ("model",),
)
CHUNKS_HELD = Metric(
    "vlmq_batch_chunks_held",
    "gauge",
    "Chunks that a worker holds under a lease; with those waiting, all that is left to do",
    ("model",),
)
OLDEST_AGE = Metric(
    "vlmq_batch_oldest_age_seconds",
    "gauge",
    "Time since the oldest batch with waiting chunks was created; 0 if there is none",
    ("model",),
)
LONGEST_WAIT = Metric(
    "vlmq_batch_longest_wait_seconds",
    "gauge",
    "How long the batch that waits longest has had none of its chunks taken; 0 if none waits",
    ("model",),
)
CONTROL_WAITING = Metric(
    "vlmq_batch_control_waiting",
    "gauge",
    "Batches that wait to be counted and cut, or to have their results joined",
)
CONTROL_LONGEST_WAIT = Metric(
    "vlmq_batch_control_longest_wait_seconds",
    "gauge",
    "How long the longest of those batches has waited; 0 if there is none",
)
BATCHES = Metric(
    "vlmq_batches",
    "gauge",
    "Batches that have not ended, by state",
    ("state",),
    {"state": ("validating", "in_progress", "finalizing")},
)
BATCHES_CREATED = Metric("vlmq_batches_created_total", "counter", "Batches that were entered")
BATCHES_ENDED = Metric(
    "vlmq_batches_ended_total",
    "counter",
    "Batches that ended, by how",
    ("state",),
    {"state": ("completed", "failed", "expired", "cancelled")},
)
BATCH_ITEMS = Metric(
    "vlmq_batch_items_total",
    "counter",
    "Lines of batches by outcome; never_run: the batch was cancelled or expired first",
    ("model", "outcome"),
    {"outcome": ("completed", "failed", "never_run")},
)
LEASES_HELD = Metric("vlmq_leases_held", "gauge", "Pieces of batches that workers hold right now")
LEASES_REAPED = Metric(
    "vlmq_leases_reaped_total",
    "counter",
    "Pieces of batches taken back from workers that died, or were silent past their lease",
    ("reason",),
    {"reason": ("expired", "worker_died")},
)

# --- chat and batches -------------------------------------------------------------------------

_WORK = ("batch", "chat")
IMAGES = Metric(
    "vlmq_images_total",
    "counter",
    "Images in requests that were answered",
    ("model", "work"),
    {"work": _WORK},
)
TOKENS = Metric(
    "vlmq_tokens_total",
    "counter",
    "Tokens of requests that were answered: read (prompt, images included) and written",
    ("model", "work", "kind"),
    {"work": _WORK, "kind": ("prompt", "completion")},
)

# --- chat -------------------------------------------------------------------------------------

CHATS_OPEN = Metric(
    "vlmq_chat_open", "gauge", "Chat requests that wait or are being answered, of all models"
)
CHATS_WAITING = Metric(
    "vlmq_chat_waiting",
    "gauge",
    "Chat tickets in the queue that no consumer has taken yet",
    ("model",),
)
CHATS = Metric(
    "vlmq_chat_requests_total",
    "counter",
    "Chat requests by outcome; aborted: the client went away, or the API was stopped",
    ("model", "outcome"),
    {"outcome": ("completed", "failed", "aborted")},
)
CHAT_ERRORS = Metric(
    "vlmq_chat_errors_total",
    "counter",
    "Chat requests that failed, by the error's code; refused ones included",
    ("model", "code"),
)
FIRST_TOKEN = Metric(
    "vlmq_chat_first_token_seconds",
    "histogram",
    "From a chat request's submission to its first text, as the API sees it",
    ("model",),
    buckets=(0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60),
)
CHAT_DURATION = Metric(
    "vlmq_chat_duration_seconds",
    "histogram",
    "From a chat request's submission to its complete answer",
    ("model",),
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600),
)

# --- fine-tunes -------------------------------------------------------------------------------

FINETUNES = Metric(
    "vlmq_finetunes",
    "gauge",
    "Fine-tunes that have not ended, by state",
    ("state",),
    {"state": ("validating_files", "queued", "running", "paused")},
)
FINETUNES_CREATED = Metric(
    "vlmq_finetunes_created_total", "counter", "Fine-tunes that were entered"
)
FINETUNES_ENDED = Metric(
    "vlmq_finetunes_ended_total",
    "counter",
    "Fine-tunes that ended, by how",
    ("state",),
    {"state": ("succeeded", "failed", "cancelled")},
)
FINETUNE_STEP = Metric(
    "vlmq_finetune_step_seconds",
    "gauge",
    "Time per optimizer step of what trains now, by the base model; the longest if several do",
    ("model",),
)
FINETUNE_LEASES_REAPED = Metric(
    "vlmq_finetune_leases_reaped_total",
    "counter",
    "Fine-tunes taken back from workers that died, or were silent past their lease",
    ("reason",),
    {"reason": ("expired", "worker_died")},
)
FINETUNE_GPUS = Metric(
    "vlmq_finetune_gpus",
    "gauge",
    "GPUs that fine-tunes may take, by whether one has taken it",
    ("node", "state"),
    {"state": ("free", "taken")},
)

# --- machines ---------------------------------------------------------------------------------

NODES = Metric("vlmq_nodes", "gauge", "Nodes that reported within the last seconds")
PROGRAM_READY = Metric(
    "vlmq_program_ready", "gauge", "1 if this program of the node is ready", ("node", "program")
)
REPLICAS = Metric(
    "vlmq_replicas",
    "gauge",
    "Engine processes by state",
    ("node", "model", "state"),
    {"state": ("starting", "ready", "failed", "restarting", "stopping", "unloaded", "lent")},
)
REPLICA_RESTARTS = Metric(
    "vlmq_replica_restarts_total",
    "counter",
    "How often this engine process was started again since its node started",
    ("node", "model", "replica"),
)
GPU_MEMORY_USED = Metric(
    "vlmq_gpu_memory_used_bytes",
    "gauge",
    "GPU memory in use by whomever, with some hundred MB that the driver reserves",
    ("node", "gpu"),
)
GPU_MEMORY_TOTAL = Metric(
    "vlmq_gpu_memory_total_bytes", "gauge", "GPU memory there is", ("node", "gpu")
)
GPU_UTILISATION = Metric(
    "vlmq_gpu_utilisation_ratio",
    "gauge",
    "Share of the driver's last sampling period in which the GPU ran something, 0 to 1",
    ("node", "gpu"),
)
STORAGE_FREE = Metric(
    "vlmq_storage_free_bytes", "gauge", "Free room where the data folder is, for this user"
)
STORAGE_TOTAL = Metric(
    "vlmq_storage_total_bytes", "gauge", "Size of the file system that the data folder is on"
)
STORAGE_MIN_FREE = Metric(
    "vlmq_storage_min_free_bytes",
    "gauge",
    "With less free room than this, uploads and batches are refused (storage.min_free_bytes)",
)
BUILD = Metric("vlmq_build_info", "gauge", "Always 1; the version is in the label", ("version",))

METRICS: tuple[Metric, ...] = (
    CHUNKS_WAITING,
    CHUNKS_HELD,
    OLDEST_AGE,
    LONGEST_WAIT,
    CONTROL_WAITING,
    CONTROL_LONGEST_WAIT,
    BATCHES,
    BATCHES_CREATED,
    BATCHES_ENDED,
    BATCH_ITEMS,
    LEASES_HELD,
    LEASES_REAPED,
    IMAGES,
    TOKENS,
    CHATS_OPEN,
    CHATS_WAITING,
    CHATS,
    CHAT_ERRORS,
    FIRST_TOKEN,
    CHAT_DURATION,
    FINETUNES,
    FINETUNES_CREATED,
    FINETUNES_ENDED,
    FINETUNE_STEP,
    FINETUNE_LEASES_REAPED,
    FINETUNE_GPUS,
    NODES,
    PROGRAM_READY,
    REPLICAS,
    REPLICA_RESTARTS,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
    GPU_UTILISATION,
    STORAGE_FREE,
    STORAGE_TOTAL,
    STORAGE_MIN_FREE,
    BUILD,
)


class Counts:
    """What this process counted and Redis does not know yet; its size is that of the labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()

    def add(self, metric: Metric, *labels: str, by: int = 1) -> None:
        """Count ``by`` more."""
        if by:
            with self._lock:
                self._pending[field(metric, *labels)] += by

    def observe(self, metric: Metric, *labels: str, seconds: float) -> None:
        """Enter one duration into a histogram."""
        at = bisect.bisect_left(metric.buckets, seconds)
        bound = str(metric.buckets[at]) if at < len(metric.buckets) else _INF
        with self._lock:
            self._pending[field(metric, *labels, bound)] += 1
            self._pending[field(metric, *labels, _SUM)] += round(seconds * MICROSECONDS)

    @contextmanager
    def told(self) -> Iterator[Mapping[str, int]]:
        """Fields to add to in the block; kept if Redis does not answer.

        If only Redis's answer was lost they are added twice: a rare surplus rather than a gap.
        """
        with self._lock:
            pending, self._pending = self._pending, Counter()
        try:
            yield pending
        except QueueUnavailable:
            with self._lock:
                self._pending.update(pending)
            raise


class Histogram(msgspec.Struct):
    """What a histogram holds: by upper bound in seconds, how many are at most so long."""

    buckets: list[tuple[str, float]]
    sum_s: float


def field(metric: Metric, *labels: str) -> str:
    """Where a counter is in the hash."""
    return SEPARATOR.join((metric.name, *labels))


def counted(fields: Mapping[str, int], metric: Metric) -> dict[tuple[str, ...], int]:
    """A counter's values by its labels' values, in the order of ``metric.labels``."""
    found = {}
    for name, value in fields.items():
        metric_name, *labels = name.split(SEPARATOR)
        if metric_name == metric.name and len(labels) == len(metric.labels):
            found[tuple(labels)] = value
    return found


def histogram(fields: Mapping[str, int], metric: Metric, *labels: str) -> Histogram:
    """A histogram for these labels' values, empty if nothing was observed."""
    bounds = [*(str(bound) for bound in metric.buckets), _INF]
    total, buckets = 0, []
    for bound in bounds:
        total += fields.get(field(metric, *labels, bound), 0)
        buckets.append((bound, float(total)))
    return Histogram(buckets, fields.get(field(metric, *labels, _SUM), 0) / MICROSECONDS)
