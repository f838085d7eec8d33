"""How soon lmdeploy's PyTorch engine begins with a prompt that came beside running ones.

While at least half of its places are taken that engine makes up to ``prefill_interval`` steps for
those that run (16 by default) before it makes one for new prompts, so that each of those has many.
That is right for a batch, and a chat waits for it a third of a second and more. There is no public
way to change the interval of an engine that runs, so this module knows where lmdeploy keeps it.
"""

from __future__ import annotations

from typing import Any

from shared.log import get_logger

log = get_logger(__name__)

AT_ONCE = 0
"""The interval in which new prompts are begun with in the next step."""


class PrefillSteps:
    """Changes that interval. ``engine`` is lmdeploy's ``pytorch.engine.engine.Engine``."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._usual: int | None = None
        self._told = False

    def hurry(self, hurried: bool) -> None:  # noqa: FBT001 - a state, not an option
        """Begin with new prompts in the next step, or as usual again. From any thread."""
        try:
            loop = self._engine._engine_loop  # noqa: SLF001
            if loop is None:
                return  # nothing was asked yet, so nothing runs that a chat could wait for
            config = loop.inputs_maker.config
            if self._usual is None:
                self._usual = config.prefill_interval
            config.prefill_interval = AT_ONCE if hurried else self._usual
        except AttributeError as error:
            if not self._told:
                self._told = True
                log.warning("this lmdeploy lets chats wait for prefill_interval", reason=str(error))
