"""Which queues a consumer takes tickets from, as models come and go while it runs.

``Wanted`` says which they should be; ``Subscriber`` keeps a running Celery worker to that. It has a
thread because shared storage and Redis may hang, and the worker's own loop must not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from shared.connection import connect
from shared.errors import QueueUnavailable, VlmqError
from shared.leases import CONTROL_LANE, Leases, model_of
from shared.log import get_logger
from shared.models import ModelRecord, ModelRegistry
from shared.presence import Presence
from shared.queue import CONTROL_QUEUE, batch_queue, chat_queue
from shared.scripts import Scripts
from shared.settings import ServeSettings, Settings
from shared.storage import Layout
from workers.inference.engines.standby import Standby
from workers.serving import own_entries, serve_now

log = get_logger(__name__)

TURN_S = 1.0


class Wanted:
    """The queues of one consumer of this node, asked of the registry and of Redis."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = ModelRegistry(Layout(settings.data_dir))
        self._redis = connect(settings, max_connections=2)
        self._leases = Leases(self._redis, Scripts(self._redis), ttl_s=settings.queue.lease_ttl_s)
        self._presence = Presence(self._redis)
        self._orphans: list[str] = []

    def entries(self) -> tuple[ServeSettings, ...]:
        """What this node serves by itself, tuned models apart. Raises: StorageFailed."""
        return own_entries(self._settings.node.serve, self._registry.by_name())

    def chat(self) -> list[str]:
        """The queues of chat requests for the models that are served here. Raises: StorageFailed."""
        models = self._takes(self._registry.by_name())
        return [chat_queue(model) for model in sorted(models)]

    def batch(self) -> list[str]:
        """The control queue and those of chunks for the models that are served here.

        Also those of models that are linked no more, for somebody has to fail what is left of their
        batches. Raises: StorageFailed.
        """
        records = self._registry.by_name()
        self._orphans = self._find_orphans(records)
        models = sorted({*self._takes(records), *self._orphans})
        return [CONTROL_QUEUE, *(batch_queue(model) for model in models)]

    def close(self) -> None:
        """Let go of Redis."""
        self._redis.close()

    def _takes(self, records: dict[str, ModelRecord]) -> list[str]:
        served = serve_now(self._settings.node.serve, records)
        return [model for model in served if not self._left_to_others(model)]

    def _left_to_others(self, model: str) -> bool:
        """Whether this machine's GPUs are lent while another machine's engines answer."""
        if not Standby(self._settings.run_dir, model).lent():
            return False
        try:
            return self._presence.serving(model)
        except QueueUnavailable:
            return False

    def _find_orphans(self, records: dict[str, ModelRecord]) -> list[str]:
        try:
            lanes = self._leases.lanes()
        except QueueUnavailable:
            return self._orphans  # without Redis there are no tickets either
        waiting = [model_of(lane) for lane in lanes if lane != CONTROL_LANE]
        return [model for model in waiting if model not in records]


class Subscriber:
    """Keeps a Celery worker on the queues that ``wanted`` names.

    ``consumer`` is the worker's, which stays the same when it connects to Redis anew; what it is
    subscribed to then is what it was subscribed to before, and what was asked for meanwhile and
    forgotten is asked for again in the next turn.
    """

    def __init__(self, consumer: Any, wanted: Callable[[], Sequence[str]]) -> None:
        self._consumer = consumer
        self._wanted = wanted
        self._closing = threading.Event()
        self._silent = False
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Change nothing any more: the worker is stopping."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(TURN_S):
            try:
                wanted = frozenset(self._wanted())
            except VlmqError as error:
                if not self._silent:
                    log.warning("queues_not_renewed", reason=error.message)
                self._silent = True
                continue
            self._silent = False
            if wanted != self._taken():
                self._consumer.call_soon(self._apply, wanted)

    def _taken(self) -> frozenset[str]:
        return frozenset(self._consumer.app.amqp.queues.consume_from)

    def _apply(self, wanted: frozenset[str]) -> None:
        """Runs in the worker's own loop, as Celery's remote control would have it."""
        consumer = self._consumer
        if self._closing.is_set() or consumer.task_consumer is None:
            return
        taken = self._taken()
        for queue in sorted(wanted - taken):
            # Looking it up defines it, as it is for the queues a worker starts with.
            consumer.add_task_queue(consumer.app.amqp.queues[queue].name)
        for queue in sorted(taken - wanted):
            consumer.cancel_task_queue(queue)
        log.info("queues_changed", taken=sorted(wanted - taken), left=sorted(taken - wanted))
