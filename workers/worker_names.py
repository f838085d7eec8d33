"""The names under which processes hold leases: NODE:RUN:PID:START.

The start time tells a process from an earlier one with its pid; the run tells what a node started
from what it had started before it was restarted.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from shared.process import start_ticks
from shared.settings import Settings


class WorkerName(NamedTuple):
    """A name taken apart; ``started`` in clock ticks since boot."""

    node: str
    run_id: str
    pid: int
    started: int

    @classmethod
    def read(cls, name: str) -> WorkerName | None:
        """Take a name apart; ``None`` if it is not such a name."""
        parts = name.rsplit(":", 3)
        if len(parts) != 4 or not (parts[2].isdecimal() and parts[3].isdecimal()):
            return None
        return cls(parts[0], parts[1], int(parts[2]), int(parts[3]))

    def __str__(self) -> str:
        return f"{self.node}:{self.run_id}:{self.pid}:{self.started}"

    @property
    def is_alive(self) -> bool:
        """Whether that process still runs. Only its own machine can tell."""
        return start_ticks(self.pid) == self.started


def worker_name(settings: Settings) -> str:
    """This process."""
    pid = os.getpid()
    return str(WorkerName(settings.node.name, settings.node.run_id, pid, start_ticks(pid)))
