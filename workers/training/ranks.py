"""One training process per GPU, as one program: they live, stop and die together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType

from shared.process import die_with_parent, free_port

MARK = "VLMQ_TRAINER_RANK"
"""Set for the processes that are started here."""
GRACE_S = 30.0
"""How long the others may take to end after the first has, before they are killed."""
_POLL_S = 0.1


def run(command: Sequence[str], count: int) -> int:
    """Run ``command`` once per GPU; returns the exit status of the one that ended first badly.

    SIGTERM and SIGINT are handed on. A process that was killed counts as ``128 + signal``.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a handler's signature
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    port = free_port()
    assert threading.current_thread() is threading.main_thread()  # its end is what kills them
    try:
        for rank in range(count):
            # One by one into the list, so that a signal finds those there are.
            processes.append(_start(command, rank, count, port))  # noqa: PERF401
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def _start(command: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        MARK: str(rank),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        command,
        env=environment,
        preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed the others have ``GRACE_S`` left."""
    status = 0
    deadline: float | None = None
    # A list, so that each of them is asked.
    while None in [process.poll() for process in processes]:
        status = status or _first_failure(processes)
        if status and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    return status or _first_failure(processes)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    for process in processes:
        if process.returncode:
            return process.returncode if process.returncode > 0 else 128 - process.returncode
    return 0
