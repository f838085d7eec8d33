"""A fine-tune on the screen: a bar with its loss on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from cli.client import Json
from cli.output import err, note

PLAIN_LINE_S = 10.0
"""Without a terminal, progress is one line this often."""
Show = Callable[[Json, Sequence[Json]], None]
_LEVELS = {"warn": "yellow", "error": "red"}


@contextlib.contextmanager
def display() -> Iterator[Show]:
    """What is called with the job as it is now and the events that are new, oldest first."""
    if not err.is_terminal:
        yield PlainDisplay().show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=err) as bar:
        yield BarDisplay(bar).show


class BarDisplay:
    """A bar of optimizer steps; events appear above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("waiting", total=None, figures="")

    def show(self, job: Json, events: Sequence[Json]) -> None:
        """Bring the bar up to date."""
        _print_events(self._bar.console, events)
        progress = job["vlmq"]["progress"]
        self._bar.update(
            self._task,
            description=state_words(job),
            total=progress["total_steps"] or None,
            completed=progress["step"],
            figures=figures(job),
        )


class PlainDisplay:
    """Lines for a log: at every change of state or stage, and every PLAIN_LINE_S of training."""

    def __init__(self) -> None:
        self._words = ""
        self._step = 0
        self._next_at = 0.0

    def show(self, job: Json, events: Sequence[Json]) -> None:
        """Write the lines that are due."""
        _print_events(err, events)
        progress = job["vlmq"]["progress"]
        words, step, now = state_words(job), progress["step"], time.monotonic()
        if words == self._words and (step == self._step or now < self._next_at):
            return
        self._words, self._step, self._next_at = words, step, now + PLAIN_LINE_S
        line = f"{words} {steps(progress)}" if progress["total_steps"] else words
        note(", ".join(part for part in (line, figures(job)) if part))


def state_words(job: Json) -> str:
    """Where a job is, e.g. ``running: train`` or ``queued: waits for 2 GPUs``."""
    extras, status = job["vlmq"], str(job["status"])
    asked = {"pause": "pausing", "cancel": "cancelling"}.get(extras["wanted"])
    if status == "running":
        status = asked or f"running: {extras['stage']}"
    if extras["waiting_for"]:
        status += f": waits for {extras['waiting_for']}"
    return status


def steps(progress: Json) -> str:
    """How many optimizer steps are done, e.g. ``120/600``."""
    return f"{progress['step']}/{progress['total_steps']}"


def figures(job: Json) -> str:
    """Loss and learning rate as far as they are known; speed and time left while it trains."""
    progress = job["vlmq"]["progress"]
    trains = job["status"] == "running" and job["vlmq"]["stage"] == "train"
    found = []
    if progress["loss"] is not None:
        found.append(f"loss {progress['loss']:.4f}")
    if progress["learning_rate"] is not None:
        found.append(f"lr {progress['learning_rate']:.2e}")
    if trains and progress["samples_per_s"] is not None:
        found.append(f"{progress['samples_per_s']:,.1f} samples/s")
    if trains and progress["eta_s"] is not None:
        found.append(f"{duration(progress['eta_s'])} left")
    return "  ".join(found)


def duration(seconds: float) -> str:
    """A time as people read it: ``45s``, ``3m 20s``, ``2h 05m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def _print_events(console: Console, events: Sequence[Json]) -> None:
    for event in events:
        if event["type"] == "message":
            console.print(Text(f"  {event['message']}", style=_LEVELS.get(event["level"], "")))
