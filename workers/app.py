"""The Celery workers: which pool serves which queues, and how they stop.

Batch: a prefork pool, one chunk at a time per process. Chat: a threads pool, one request per
thread. Fine-tunes: a threads pool, one job per thread. All acknowledge early; what must not be lost is guarded by leases, not by the queue.
"""

from __future__ import annotations

import gc
import mmap
import os
import struct
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery, signals
from celery.exceptions import SecurityWarning

from shared.log import get_logger
from shared.process import die_with_parent, usable_cores
from shared.queue import FINETUNE_QUEUE, make_celery
from shared.settings import Settings
from workers.batch_worker import BatchWorker
from workers.finetune_worker import FinetuneWorker, threads_of
from workers.heap import keep_freed_memory
from workers.inference.chat import ChatWorker
from workers.placement import count_batch_processes
from workers.subscriptions import Subscriber, Wanted
from workers.tasks import register_batch_task, register_chat_task, register_finetune_task
from workers.worker_names import worker_name

log = get_logger(__name__)


class DrainFlag:
    """When stopping began, seen by all prefork children at once (shared memory)."""

    _TIME = struct.Struct("d")

    def __init__(self, drain_s: float) -> None:
        self._memory = mmap.mmap(-1, self._TIME.size)
        self._drain_s = drain_s

    def set(self) -> None:
        """Stopping begins now."""
        self._memory[:] = self._TIME.pack(time.monotonic())

    def is_set(self) -> bool:
        """Whether no new work should be taken."""
        return self._since() > 0

    def is_over(self) -> bool:
        """Whether work in hand should be dropped, too."""
        since = self._since()
        return since > 0 and time.monotonic() - since > self._drain_s

    def _since(self) -> float:
        (since,) = self._TIME.unpack(self._memory[:])
        return float(since)


def run_batch_consumer(settings: Settings) -> None:
    """Serve the control queue and the batch queues of this node's models until SIGTERM.

    Raises: StorageFailed if the registry of models cannot be read.
    """
    os.nice(settings.node.batch_nice)
    app = make_celery(settings)
    flag = DrainFlag(settings.queue.drain_s)
    worker: list[BatchWorker] = []

    def after_fork(**_: Any) -> None:
        die_with_parent()
        # What was imported is never garbage, and chunks make millions of short-lived objects.
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        keep_freed_memory()
        worker[:] = [
            BatchWorker(
                settings,
                worker_name(settings),
                is_draining=flag.is_set,
                must_stop=flag.is_over,
            )
        ]

    def run_slice(lane: str) -> None:
        worker[0].run_slice(lane)

    def on_stop(**_: Any) -> None:
        flag.set()

    signals.worker_process_init.connect(after_fork, weak=False)
    signals.worker_shutting_down.connect(on_stop, weak=False)
    register_batch_task(app, run_slice)
    wanted = Wanted(settings)
    processes = count_batch_processes(settings.node, wanted.entries(), usable_cores())
    _run(app, "batch", settings, wanted.batch, pool="prefork", concurrency=processes)


def run_chat_consumer(settings: Settings) -> None:
    """Serve the chat queues of this node's models until SIGTERM.

    Raises: StorageFailed if the registry of models cannot be read.
    """
    app = make_celery(settings)
    worker = ChatWorker(settings, worker_name(settings))

    def on_stop(**_: Any) -> None:
        timer = threading.Timer(settings.queue.drain_s, worker.abort_all)
        timer.daemon = True
        timer.start()

    signals.worker_shutting_down.connect(on_stop, weak=False)
    register_chat_task(app, worker.run)
    worker.start()
    wanted, threads = Wanted(settings), settings.node.chat_threads
    try:
        _run(app, "chat", settings, wanted.chat, pool="threads", concurrency=threads)
    finally:
        worker.close()


def run_finetune_consumer(settings: Settings) -> None:
    """Serve the queue of fine-tunes until SIGTERM; then trainings save a checkpoint and end."""
    app = make_celery(settings)
    worker = FinetuneWorker(settings, worker_name(settings))

    def on_stop(**_: Any) -> None:
        worker.stop()

    signals.worker_shutting_down.connect(on_stop, weak=False)
    register_finetune_task(app, worker.run)
    threads = threads_of(settings)

    def finetune_queues() -> list[str]:
        return [FINETUNE_QUEUE]

    try:
        _run(app, "finetune", settings, finetune_queues, pool="threads", concurrency=threads)
    finally:
        worker.close()


def _run(
    app: Celery,
    role: str,
    settings: Settings,
    wanted: Callable[[], Sequence[str]],
    *,
    pool: str,
    concurrency: int,
) -> None:
    queues = wanted()
    subscribers: list[Subscriber] = []

    def on_ready(sender: Any, **_: Any) -> None:
        subscribers.append(Subscriber(sender, wanted))

    def on_stop(**_: Any) -> None:
        for subscriber in subscribers:
            subscriber.stop()

    signals.worker_ready.connect(on_ready, weak=False)
    signals.worker_shutting_down.connect(on_stop, weak=False)
    app.conf.worker_prefetch_multiplier = 1
    # Its advice about root concerns pickled tasks; ours are JSON with one string.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    log.info("consumer_starting", role=role, queues=queues, concurrency=concurrency)
    app.worker_main(
        [
            "worker",
            f"--hostname={role}@{settings.node.name}",
            f"--queues={','.join(queues)}",
            f"--pool={pool}",
            f"--concurrency={concurrency}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=WARNING",
        ]
    )
