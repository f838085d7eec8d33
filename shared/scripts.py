"""The Lua scripts: each step on a job's record is one of them, so that it happens whole."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from importlib import resources
from typing import Any, TypeVar

import msgspec
from redis.commands.core import Script

from shared.connection import Connection
from shared.finetunes import FINETUNE_TRANSITIONS
from shared.jobs import TRANSITIONS

S = TypeVar("S", bound=enum.StrEnum)


def _prelude() -> str:
    folder = resources.files("shared") / "lua"
    text = "\n".join((folder / name).read_text() for name in ("lib.lua", "ft_lib.lua"))
    text = text.replace("@TRANSITIONS@", _table(TRANSITIONS))
    return text.replace("@FINETUNE_TRANSITIONS@", _table(FINETUNE_TRANSITIONS))


def _table(transitions: Mapping[S, frozenset[S]]) -> str:
    """A table of states as JSON: ``{from: {to: true}}``."""
    table = {
        state.value: {to.value: True for to in following}
        for state, following in transitions.items()
    }
    return msgspec.json.encode(table).decode()


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
