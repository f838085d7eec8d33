"""Which of vlmq's programs a process is."""

from __future__ import annotations

from pathlib import Path

_ROLES = {
    "valkey-server": "redis",
    "redis-server": "redis",
    "workers.inference.engines.host": "engine",
    "workers.reaper": "reaper",
    "workers.consumer batch": "batch consumer",
    "workers.consumer chat": "chat consumer",
    "workers.consumer finetune": "fine-tune consumer",
    "api.server": "api",
    "workers.node": "node",
}


def role_of(pid: int) -> str:
    """The program of a process of a node. Raises: OSError if it is gone."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return next(role for words, role in _ROLES.items() if words in command)
