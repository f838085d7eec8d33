"""All stores of a process, connected once."""

from __future__ import annotations

from typing import Any

from shared.batches import BatchStore
from shared.chats import ChatQueue
from shared.connection import Connection, connect
from shared.files import FileStore
from shared.finetune_store import FinetuneStore
from shared.gauges import GaugeReader
from shared.idempotency import IdempotencyStore
from shared.keys import KeyStore
from shared.leases import Leases
from shared.models import ModelRegistry
from shared.presence import Presence
from shared.queue import Tickets, make_celery
from shared.rebuild import Rebuild, RebuildReport
from shared.results import ResultStore
from shared.retries import Retries
from shared.row_reader import RowReader
from shared.scripts import Scripts
from shared.settings import Settings
from shared.storage import Layout


class Stores:
    """The composition of everything below the programs; make it after forking, never before."""

    def __init__(self, settings: Settings, client: Connection) -> None:
        self.settings = settings
        self.redis: Any = client
        self.layout = Layout(settings.data_dir)
        self.layout.create()
        scripts = self._scripts = Scripts(client)
        min_free = settings.storage.min_free_bytes
        self.celery = make_celery(settings)
        self.tickets = Tickets(self.celery, client)
        self.leases = Leases(client, scripts, ttl_s=settings.queue.lease_ttl_s)
        self.files = FileStore(
            client,
            self.layout,
            max_bytes=settings.api.max_upload_bytes,
            min_free_bytes=min_free,
        )
        self.batches = BatchStore(
            client, scripts, self.layout, self.tickets, min_free_bytes=min_free
        )
        self.results = ResultStore(self.batches, self.files)
        self.rows = RowReader(self.batches, self.files, self.results)
        self.retries = Retries(self.batches, self.files, self.results)
        self.finetunes = FinetuneStore(
            client,
            scripts,
            self.layout,
            self.tickets,
            ttl_s=settings.queue.lease_ttl_s,
            min_free_bytes=min_free,
        )
        self.models = ModelRegistry(self.layout)
        self.keys = KeyStore(self.layout.keys)
        self.presence = Presence(client)
        self.chats = ChatQueue(
            client, self.tickets, self.presence, max_open=settings.api.max_waiting_chats
        )
        self.gauges = GaugeReader(client, self.presence, self.tickets)
        self.idempotency = IdempotencyStore(client)

    @classmethod
    def connect(cls, settings: Settings) -> Stores:
        """Stores on the configured Redis; the first command connects."""
        return cls(settings, connect(settings))

    def rebuild(self) -> RebuildReport:
        """Put back into Redis what shared storage holds and Redis lacks."""
        return Rebuild(
            self.redis, self._scripts, self.layout, self.files, self.batches, self.finetunes
        ).run()

    def close(self) -> None:
        """Let go of threads and connections."""
        self.chats.close()
        self.celery.close()
        self.redis.close()
