"""What a process may use, a port for it, what the kernel says of it, and tying its life to its parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def usable_cores() -> int:
    """The processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if there is none (or no /proc)."""
    return _stat(pid, 1)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none (or no /proc)."""
    return _stat(pid, 19)


def _stat(pid: int, field: int) -> int:
    """A number of ``/proc/PID/stat``, counted from behind the name."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in parentheses may itself hold spaces and parentheses.
    return int(status.rpartition(")")[2].split()[field])


def die_with_parent(parent_pid: int | None = None) -> bool:
    """Have the kernel kill this process (SIGKILL) when its parent dies.

    ``parent_pid`` is the parent's id as the parent itself gave it; if the parent is gone already,
    this process exits here with status 1. Without it only a death during this call is noticed.
    Returns False on systems other than Linux, where nothing is done. Linux watches the *thread*
    that started this process: start long-lived children from a thread that lives as long.
    """
    if not sys.platform.startswith("linux"):
        return False
    expected = os.getppid() if parent_pid is None else parent_pid
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # The parent may have died before the kernel knew what to do about it.
    if os.getppid() != expected:
        os._exit(1)
    return True
