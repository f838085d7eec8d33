"""Answering one chat request: take it, prepare it, stream the engine's answer back.

Runs in a thread of the chat consumer, which waits here while the engine client's own thread passes
deltas straight to the writer of replies.
"""

from __future__ import annotations

import threading
import time
from typing import Literal

from shared.chat import ChatRequest, parse_chat_request
from shared.chats import ChatDesk, ChatEvent, ChatJob
from shared.errors import EngineUnavailable, RequestAborted, RequestTimedOut, VlmqError
from shared.log import get_logger
from shared.settings import Settings
from shared.stores import Stores
from workers.inference.engines.base import Delta, Prompt
from workers.inference.engines.client import EngineClient, Expected, StreamHandle
from workers.inference.image_room import ImageRoom
from workers.inference.prompts import build_prompt
from workers.inference.uploads import OwnedImages

log = get_logger(__name__)

_BEAT_S = 2.0
HELD_IMAGE_BYTES = 512 * 1024 * 1024
IMAGE_READERS = 8


class ChatWorker:
    """Everything the threads of one chat consumer share."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        self._name = name
        self._stores = Stores.connect(settings)
        self._desk = ChatDesk(self._stores.redis)
        self._images = OwnedImages(settings.images, self._stores)
        self._room = ImageRoom(HELD_IMAGE_BYTES, readers=IMAGE_READERS)
        self._clients: dict[str, EngineClient] = {}
        self._open: dict[str, _Answer] = {}
        self._lock = threading.Lock()
        self._last_id = 0
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin to say that this consumer is alive, and to listen for aborts."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        threading.Thread(
            target=self._desk.watch_aborts, args=(self.abort,), name="aborts", daemon=True
        ).start()

    def run(self, chat_id: str) -> None:
        """Answer the request ``chat_id``, if nobody has taken it."""
        job = self._desk.take(chat_id)
        if job is None:
            return
        answer = _Answer(self._desk, job)
        with self._lock:
            self._open[job.id] = answer
        try:
            answer.say("claimed", self._name)
            self._answer(answer, job)
        except VlmqError as error:
            answer.fail(error)
        except Exception:
            log.exception("chat_failed", chat_id=job.id)
            answer.fail(VlmqError())
        finally:
            with self._lock:
                # Taken for dead, this consumer may have got the same request a second time.
                if self._open.get(job.id) is answer:
                    del self._open[job.id]

    def abort(self, chat_id: str) -> None:
        """The client of this request went away."""
        with self._lock:
            answer = self._open.get(chat_id)
        if answer is not None:
            answer.abort(RequestAborted())

    def abort_all(self) -> None:
        """The consumer must stop now: every open request fails, retryably."""
        with self._lock:
            answers = list(self._open.values())
        for answer in answers:
            answer.abort(EngineUnavailable("the worker is being stopped; send the request again"))

    def close(self) -> None:
        """Send the last events and let go."""
        self._closed.set()
        self._desk.close()
        for client in self._clients.values():
            client.close()

    def _answer(self, answer: _Answer, job: ChatJob) -> None:
        request = parse_chat_request(job.body)
        client = self._client(job.model)
        if not request.has_images:
            answer.follow(client, self._prompt(job, request, client))
            return
        expected = client.expect()
        with self._room.reading(job.deadline):
            prompt = self._prompt(job, request, client)
        with self._room.holding(sum(len(image.data) for image in prompt.images)):
            answer.follow(client, prompt, expected)

    def _prompt(self, job: ChatJob, request: ChatRequest, client: EngineClient) -> Prompt:
        with self._lock:
            self._last_id += 1
            prompt_id = self._last_id
        # Once for all images: an engine that comes up meanwhile may want them otherwise, and no
        # engine takes tiles and files in one request.
        tiling = client.tiling()
        return build_prompt(
            prompt_id,
            request,
            self._stores.models.get(job.model).defaults,
            self._images.reader(job.owner, lambda: tiling),
            limits=self._settings.images,
        )

    def _client(self, model: str) -> EngineClient:
        with self._lock:
            if model not in self._clients:
                self._clients[model] = EngineClient(
                    self._settings.run_dir,
                    model,
                    wait_s=self._settings.node.engine_wait_s,
                    standby_wait_s=self._settings.node.model_wait_s,
                )
            return self._clients[model]

    def _beat(self) -> None:
        while not self._closed.is_set():
            try:
                self._stores.presence.consumer_beat(self._name)
            except VlmqError as error:
                log.warning("beat_missed", error=str(error))
            self._closed.wait(_BEAT_S)


class _Answer:
    """One request's way through the engine."""

    def __init__(self, desk: ChatDesk, job: ChatJob) -> None:
        self._desk = desk
        self._job = job
        self._done = threading.Event()
        self._handle: StreamHandle | None = None
        self._reason: VlmqError | None = None
        self._last: Delta | None = None

    def say(self, kind: Literal["claimed", "delta"], text: str) -> None:
        """Send an event that does not end the request."""
        self._desk.send(self._job.inbox, ChatEvent(self._job.id, self._job.submission, kind, text))

    def fail(self, error: VlmqError) -> None:
        """Send the event that ends the request without an answer."""
        self._desk.send(
            self._job.inbox,
            ChatEvent(
                self._job.id,
                self._job.submission,
                "error",
                error.message,
                code=error.code,
                param=error.param,
            ),
        )

    def follow(
        self, client: EngineClient, prompt: Prompt, expected: Expected | None = None
    ) -> None:
        """Ask the engine and wait for the end, which is sent as it comes."""
        self._handle = client.stream(prompt, self._on_delta, self._on_end, expected=expected)
        if self._reason is not None:
            self._handle.abort()  # it was aborted while its images were read
        left_s = self._job.deadline - time.time()
        if not self._done.wait(timeout=max(0.0, left_s)):
            self.abort(RequestTimedOut())
            self._done.wait()

    def abort(self, reason: VlmqError) -> None:
        """Stop the engine's work on this; the request ends with ``reason``."""
        self._reason = reason
        if self._handle is not None:
            self._handle.abort()

    def _on_delta(self, delta: Delta) -> None:
        if delta.text:
            self.say("delta", delta.text)
        if delta.finish_reason is not None:
            self._last = delta

    def _on_end(self, error: VlmqError | None) -> None:
        if error is not None:
            self.fail(self._reason or error)
        elif self._last is not None and self._last.finish_reason is not None:
            self._desk.send(
                self._job.inbox,
                ChatEvent(
                    self._job.id,
                    self._job.submission,
                    "end",
                    self._last.finish_reason,
                    self._last.prompt_tokens,
                    self._last.completion_tokens,
                ),
            )
        self._done.set()
