"""The Lua scripts: each step on a batch's record is one of them, so that it happens whole."""

from __future__ import annotations

from importlib import resources
from typing import Any

import msgspec
from redis.commands.core import Script

from shared.connection import Connection
from shared.jobs import TRANSITIONS


def _prelude() -> str:
    table = {
        state.value: {to.value: True for to in to_states}
        for state, to_states in TRANSITIONS.items()
    }
    text = (resources.files("shared") / "lua" / "lib.lua").read_text()
    return text.replace("@TRANSITIONS@", msgspec.json.encode(table).decode())


class Scripts:
    """Call a script by its file's name: ``scripts("claim", lane, worker, ttl)``."""

    def __init__(self, client: Connection) -> None:
        self._client = client
        self._prelude = _prelude()
        self._loaded: dict[str, Script] = {}

    def __call__(self, name: str, *args: str | int | bytes) -> Any:
        """Run ``shared/lua/<name>.lua``. Raises: QueueUnavailable."""
        script = self._loaded.get(name)
        if script is None:
            body = (resources.files("shared") / "lua" / f"{name}.lua").read_text()
            script = self._client.register_script(f"{self._prelude}\n{body}")
            self._loaded[name] = script
        return script(args=list(args))
