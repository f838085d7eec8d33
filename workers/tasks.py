"""The three Celery tasks. Thin: a task hands its ticket to the worker and never fails."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from shared.queue import BATCH_TASK, CHAT_TASK, FINETUNE_TASK


def register_batch_task(app: Celery, run_slice: Callable[[str], None]) -> None:
    """A batch ticket: work on a lane for a slice of time."""
    app.task(_plain_task(run_slice), name=BATCH_TASK, ignore_result=True)


def register_chat_task(app: Celery, run: Callable[[str], None]) -> None:
    """A chat ticket: answer the request it names."""
    app.task(_plain_task(run), name=CHAT_TASK, ignore_result=True)


def register_finetune_task(app: Celery, run: Callable[[str], None]) -> None:
    """A fine-tune ticket: take jobs on until there is none for this worker."""
    app.task(_plain_task(run), name=FINETUNE_TASK, ignore_result=True)


def _plain_task(run: Callable[[str], None]) -> Callable[[str], None]:
    """A plain function for Celery to wrap, whatever callable it was given."""

    def task(argument: str) -> None:
        run(argument)

    return task
