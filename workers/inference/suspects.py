"""Finding the item that kills engines, without blaming its neighbours.

Items that were inside an engine when it died are suspects. They are run again as a group; if the
engine dies again the group is halved, until a single item has killed it twice on its own. Only one
consumer of a machine does this at a time, so that nobody else's poison is counted against them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shared.errors import EngineCrashed, VlmqError
from shared.storage import storage_errors
from workers.inference.engines.base import Answer, Completion, Prompt

CRASHES_TO_GIVE_UP = 2
_POLL_S = 0.2

RunGroup = Callable[[Sequence[Prompt]], list[Answer]]
"""Runs prompts and returns an answer for each; EngineCrashed for those whose engine died."""


@contextmanager
def alone(
    lock_path: Path, keep_going: Callable[[], None], pause: Callable[[float], None]
) -> Iterator[None]:
    """Wait until no other consumer of this machine retries suspects of the same model.

    ``keep_going`` is called while waiting and may raise to stop.
    """
    with storage_errors(lock_path):
        lock_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        while not _locked(descriptor):
            keep_going()
            pause(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
