"""Finding the item that kills engines, without blaming its neighbours.

Items that were inside an engine when it died are suspects. They are run again as a group; if the
engine dies again the group is halved, until a single item has killed it twice on its own. While
one consumer of a machine does this no other has items in that model's engines, so that nobody
else's poison is counted against them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared.errors import EngineCrashed, VlmqError
from shared.log import get_logger
from shared.storage import storage_errors
from workers.inference.engines.base import Answer, Completion, Prompt
from workers.inference.engines.wire import model_slug

log = get_logger(__name__)

CRASHES_TO_GIVE_UP = 2
_POLL_S = 0.2
_CHUNK_PATIENCE_S = 60.0
"""How long the retrier waits for chunks that run; a paused or hanging one must not stop it."""
_RETRY_PATIENCE_S = 600.0
"""How long chunks wait for the retrier, whose engine may take a minute for each restart."""

KeepGoing = Callable[[], None]
Pause = Callable[[float], None]

RunGroup = Callable[[Sequence[Prompt]], list[Answer]]
"""Runs prompts and returns an answer for each; EngineCrashed for those whose engine died."""


def engines_lock(run_dir: Path, model: str) -> Path:
    """The file whose locks say who of a machine's batch processes has items in a model's engines."""
    return run_dir / f"{model_slug(model)}.lock"


def in_use(path: Path) -> bool:
    """Whether some batch process of this machine has items in the engines now."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


@contextmanager
def together(lock_path: Path, keep_going: KeepGoing, pause: Pause) -> Iterator[None]:
    """Have items in the engines beside other consumers of this machine, but not beside a retrier.

    ``lock_path`` names the model; ``keep_going`` is called while waiting and may raise to stop.
    """
    with ExitStack() as stack:
        # Through the gate, so that a retrier who waits for the engines is not overtaken for ever.
        with _lock(_gate(lock_path), fcntl.LOCK_SH, keep_going, pause, _RETRY_PATIENCE_S):
            held = _lock(lock_path, fcntl.LOCK_SH, keep_going, pause, _RETRY_PATIENCE_S)
            stack.enter_context(held)
        yield


@contextmanager
def alone(lock_path: Path, keep_going: KeepGoing, pause: Pause) -> Iterator[None]:
    """Wait until no other consumer of this machine has items in the engines, and keep them out.

    ``lock_path`` and ``keep_going`` as in :func:`together`.
    """
    with (
        _lock(_gate(lock_path), fcntl.LOCK_EX, keep_going, pause, _RETRY_PATIENCE_S),
        _lock(lock_path, fcntl.LOCK_EX, keep_going, pause, _CHUNK_PATIENCE_S),
    ):
        yield


def _gate(lock_path: Path) -> Path:
    return lock_path.with_suffix(".gate")


@contextmanager
def _lock(
    path: Path, kind: int, keep_going: KeepGoing, pause: Pause, patience_s: float
) -> Iterator[None]:
    """Hold a lock of a file, or go on without it when patience ends: it only prevents blame."""
    with storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        give_up_at = time.monotonic() + patience_s
        while not _locked(descriptor, kind):
            if time.monotonic() > give_up_at:
                log.warning("suspects_lock_missed", path=str(path), waited_s=patience_s)
                break
            keep_going()
            pause(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def retry_suspects(suspects: Sequence[Prompt], run_group: RunGroup) -> Iterator[Answer]:
    """Run suspects again and answer for each: what the engine said, or EngineCrashed at last."""
    crashes_alone: dict[int, int] = {}
    groups: list[list[Prompt]] = [list(suspects)] if suspects else []
    while groups:
        group = groups.pop()
        crashed_ids: set[int] = set()
        for prompt_id, answer in run_group(group):
            if isinstance(answer, EngineCrashed):
                crashed_ids.add(prompt_id)
            else:
                yield prompt_id, answer
        crashed = [prompt for prompt in group if prompt.id in crashed_ids]
        if len(crashed) > 1:
            middle = len(crashed) // 2
            groups += [crashed[middle:], crashed[:middle]]
        elif crashed:
            [prompt] = crashed
            if len(group) == 1:
                crashes_alone[prompt.id] = crashes_alone.get(prompt.id, 0) + 1
            if crashes_alone.get(prompt.id, 0) >= CRASHES_TO_GIVE_UP:
                yield prompt.id, _given_up()
            else:
                groups.append(crashed)


def _given_up() -> Completion | VlmqError:
    return EngineCrashed(
        "the engine process died each time it worked on this request; it was given up"
    )
