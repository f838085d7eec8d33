"""The queue: Celery's messages, which are tickets.

A ticket says only "there is work in this queue". It is acknowledged early and carries no identity
beyond its queue (a chat ticket names the request, whose body is claimed separately), so a lost,
duplicate or late one is harmless and the reaper tops them up. Celery's own redelivery would both
lose and duplicate work on Redis; see docs/decisions/0001-tickets-and-leases.md.
"""

from __future__ import annotations

import functools
from typing import Any

import kombu.exceptions
from celery import Celery
from kombu.connection import Connection as BrokerConnection
from kombu.utils.uuid import uuid

from shared.connection import (
    CONNECT_TIMEOUT_S,
    HEALTH_CHECK_S,
    PREFIX,
    SOCKET_TIMEOUT_S,
    Connection,
    redis_errors,
    server_of,
)
from shared.errors import QueueUnavailable
from shared.leases import CONTROL_LANE, model_lane
from shared.settings import Settings

KEY_PREFIX = f"{PREFIX}celery:"
CONTROL_QUEUE = "control"
BATCH_TASK = "vlmq.batch"
CHAT_TASK = "vlmq.chat"
FINETUNE_QUEUE = "finetune"
FINETUNE_TASK = "vlmq.finetune"


def batch_queue(model: str) -> str:
    """The queue of tickets for chunks that need ``model``."""
    return f"batch.{model}"


def chat_queue(model: str) -> str:
    """The queue of tickets for chat requests to ``model``."""
    return f"chat.{model}"


def make_celery(settings: Settings) -> Celery:
    """The Celery application, configured so that it neither loses time nor redelivers."""
    url, password = server_of(settings)
    over_tcp = not url.startswith("unix://")
    app = Celery("vlmq", set_as_current=False)
    app.conf.update(
        broker_url=_broker_url(url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": KEY_PREFIX,
            "queue_order_strategy": "priority",
            "socket_timeout": SOCKET_TIMEOUT_S,
            "health_check_interval": HEALTH_CHECK_S,
            "visibility_timeout": 3600,
            **(
                {"socket_connect_timeout": CONNECT_TIMEOUT_S, "socket_keepalive": True}
                if over_tcp
                else {}
            ),
        },
        task_acks_late=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_create_missing_queues=True,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
    )
    if password is not None:
        # Celery has no setting for it. A password in broker_url would be shown with the settings
        # and outlive a change of the file.
        app.amqp.Connection = functools.partial(BrokerConnection, credential_provider=password)
    return app


class Tickets:
    """Publishes tickets and says how many wait."""

    def __init__(self, app: Celery, client: Connection) -> None:
        self._app = app
        self._redis: Any = client

    def publish(self, queue: str, task: str, *args: Any) -> None:
        """Put one ticket into ``queue``. Raises: QueueUnavailable."""
        message = self._app.amqp.as_task_v2(uuid(), task, args=args, kwargs={})
        try:
            with redis_errors(), self._app.producer_or_acquire() as producer:
                # Straight to the anonymous exchange: it needs no binding in Redis, so a ticket
                # finds its queue even after Redis was wiped.
                producer.publish(
                    message.body,
                    exchange="",
                    routing_key=queue,
                    headers=message.headers,
                    serializer="json",
                    retry=False,
                    **message.properties,
                )
        except (kombu.exceptions.OperationalError, OSError) as error:
            raise QueueUnavailable() from error

    def control(self) -> None:
        """Some batch waits to be planned or finalized."""
        self.publish(CONTROL_QUEUE, BATCH_TASK, CONTROL_LANE)

    def batch(self, model: str, count: int = 1) -> None:
        """Some batch has chunks for ``model``."""
        for _ in range(count):
            self.publish(batch_queue(model), BATCH_TASK, model_lane(model))

    def chat(self, model: str, chat_id: str) -> None:
        """A chat request waits for ``model``."""
        self.publish(chat_queue(model), CHAT_TASK, chat_id)

    def finetune(self) -> None:
        """Some fine-tune waits; the task's argument says nothing more. Raises: QueueUnavailable."""
        self.publish(FINETUNE_QUEUE, FINETUNE_TASK, FINETUNE_QUEUE)

    def waiting(self, queue: str) -> int:
        """How many tickets wait in ``queue``."""
        return int(self._redis.llen(self.key(queue)))

    @staticmethod
    def key(queue: str) -> str:
        """The list in Redis that holds a queue's tickets."""
        return f"{KEY_PREFIX}{queue}"


def _broker_url(url: str) -> str:
    return f"redis+socket://{url.removeprefix('unix://')}" if url.startswith("unix://") else url
