"""``python -m workers.bound PARENT_PID COMMAND…``: become COMMAND, which dies with its parent.

The tie is made before the command starts and survives ``exec``, so it also holds for programs that
are not ours (Valkey) and during the imports of those that are.
"""

from __future__ import annotations

import os
import sys

from shared.process import die_with_parent


def bound(command: tuple[str, ...]) -> tuple[str, ...]:
    """``command``, as this process has to start it so that it dies with this process."""
    return (sys.executable, "-m", "workers.bound", str(os.getpid()), *command)


def main() -> None:
    """Tie this process to its parent, then exec the rest of the command line."""
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
