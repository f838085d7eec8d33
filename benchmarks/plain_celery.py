"""What vlmq is compared with: the same job as a plain Celery application, one task per item.

Home-made but not carelessly: two prefork processes, early acknowledgement, a wide prefetch, one
producer for all messages, no result backend (its publish and subscribe per task cost more than
the answer) but one Redis call per task, and a collector that asks for the answers in bulk. The
answer itself is computed in the task, by a function: no engine process, no socket, no images, no
validation, no leases. All of that is in the competitor's favour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import celery
import redis

from shared.settings import Settings
from workers import redis_server

_URL_VARIABLE = "BENCHMARK_REDIS_SOCKET"
_QUEUE = "items"
_ANSWERS = "answers"
_PROCESSES = 2
_PREFETCH = 64
_BULK = 1000
_POLL_S = 0.02
_START_LIMIT_S = 60.0
_RUN_LIMIT_S = 600.0


def make_app(socket: str) -> celery.Celery:
    """The application, its tasks included, on the Redis behind a Unix socket."""
    app = celery.Celery("plain", broker=f"redis+socket://{socket}", set_as_current=False)
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        task_default_queue=_QUEUE,
        worker_prefetch_multiplier=_PREFETCH,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
    )
    answers: Any = redis.Redis(unix_socket_path=socket)

    @app.task(name="plain.answer")  # type: ignore[untyped-decorator]
    def answer(number: int, line: str) -> None:
        answers.hset(_ANSWERS, number, answer_line(line))

    return app


def answer_line(line: str) -> str:
    """The output line for one input line: the echo engine's answer, without the engine."""
    request = json.loads(line)
    body = request["body"]
    text = body["messages"][-1]["content"]
    words = text.split()
    text = " ".join(words[: body["max_tokens"]])
    tokens = min(len(words), body["max_tokens"])
    completion = {
        "id": f"chatcmpl-{request['custom_id']}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": "stop" if tokens == len(words) else "length",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(words),
            "completion_tokens": tokens,
            "total_tokens": len(words) + tokens,
        },
    }
    response = {"status_code": 200, "request_id": request["custom_id"], "body": completion}
    result = {
        "id": f"batch_req_{request['custom_id']}",
        "custom_id": request["custom_id"],
        "response": response,
        "error": None,
    }
    return json.dumps(result)


class PlainCelery:
    """A running server and worker of the plain application."""

    def __init__(self, socket: str) -> None:
        self._app = make_app(socket)
        self._redis: Any = redis.Redis(unix_socket_path=socket)

    def run(self, source: Path, output: Path) -> float:
        """Answer every line of ``source`` into ``output``, in order, fsynced; returns seconds.

        Raises: TimeoutError if the worker does not get through.
        """
        self._redis.delete(_ANSWERS)
        start = time.perf_counter()
        items = self._publish(source)
        while self._redis.hlen(_ANSWERS) < items:
            if time.perf_counter() - start > _RUN_LIMIT_S:
                raise TimeoutError("the plain Celery worker is stuck; it answered too few items")
            time.sleep(_POLL_S)
        self._collect(output, items)
        return time.perf_counter() - start

    def _publish(self, source: Path) -> int:
        items = 0
        task = self._app.tasks["plain.answer"]
        with self._app.producer_or_acquire() as producer, open(source) as lines:
            for line in lines:
                task.apply_async((items, line), producer=producer)
                items += 1
        return items

    def _collect(self, output: Path, items: int) -> None:
        with open(output, "wb") as stream:
            for first in range(0, items, _BULK):
                numbers = range(first, min(first + _BULK, items))
                stream.writelines(answer + b"\n" for answer in self._redis.hmget(_ANSWERS, numbers))
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def plain_celery() -> Iterator[PlainCelery]:
    """Server (the same program with the same options as vlmq's own) and worker, warmed up."""
    with tempfile.TemporaryDirectory(prefix="plain-celery-") as name:
        folder = Path(name)
        settings = Settings(storage={"data_dir": folder, "run_dir": folder})  # type: ignore[arg-type]
        redis_server.data_folder(settings).mkdir()
        socket = redis_server.socket_path(settings)
        with (
            _running(redis_server.command(settings), folder, "redis"),
            _running(_worker_command(), folder, "worker", {_URL_VARIABLE: str(socket)}),
        ):
            _wait(socket)
            plain = PlainCelery(str(socket))
            warm_up = folder / "warm-up.jsonl"
            warm_up.write_text(
                '{"custom_id": "w", "body": {"model": "echo", "max_tokens": 1,'
                ' "messages": [{"role": "user", "content": "w"}]}}\n' * 200
            )
            plain.run(warm_up, folder / "warm-up.out")
            yield plain


def _worker_command() -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.plain_celery")


@contextmanager
def _running(
    command: tuple[str, ...], folder: Path, name: str, environment: dict[str, str] | None = None
) -> Iterator[None]:
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait(socket: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while not redis_server.answers(socket):
        if time.monotonic() > deadline:
            raise TimeoutError("the server of the plain application did not start")
        time.sleep(_POLL_S)


def _work() -> None:
    """Be the worker."""
    socket = os.environ[_URL_VARIABLE]
    make_app(socket).worker_main(
        [
            "worker",
            "--pool=prefork",
            f"--concurrency={_PROCESSES}",
            f"--queues={_QUEUE}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "--loglevel=WARNING",
        ]
    )


if __name__ == "__main__":
    _work()
