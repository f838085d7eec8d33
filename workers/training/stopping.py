"""A request to stop: SIGTERM or SIGINT, answered at the end of a step."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from workers.training.orders import TrainerExit


class StopRequest:
    """Whether this process was asked to stop. Before training began it ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self.begun = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.begun:
            # Nothing is there to be saved, and whatever is being imported must not catch this.
            sys.stdout.flush()
            os._exit(TrainerExit.STOPPED)
