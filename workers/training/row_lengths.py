"""How many tokens a row takes, so that xtuner never has to cut one.

Counts what xtuner's InternVL dataset builds: the system prompt that it always sets, each question
in the model's chat template with the image's context tokens in front, each answer with its end.
Source: ``xtuner.dataset.internvl_dataset`` 0.2.0 and its templates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from workers.inference.engines.base import Tiling
from workers.inference.tiling import tile_count
from workers.training.rows import Row

CountTokens = Callable[[str], int]
"""How many tokens plain text takes in the base's tokenizer, none added."""

Family = Literal["internlm2", "phi3"]


class _Layout(msgspec.Struct, frozen=True):
    """The texts between control tokens, and how many control tokens there are."""

    system: tuple[str, ...]
    before_question: str
    after_question: tuple[str, ...]
    system_controls: int
    turn_controls: int


_LAYOUTS: dict[Family, _Layout] = {
    # <s><|im_start|>system\n…<|im_end|>, then for each turn
    # <|im_start|>user\n…<|im_end|><|im_start|>assistant\n…<|im_end|>
    "internlm2": _Layout(
        system=("system\nYou are an AI assistant whose name is InternLM (书生·浦语).",),
        before_question="user\n",
        after_question=("assistant\n",),
        system_controls=3,
        turn_controls=4,
    ),
    # <s><|system|>\n…<|end|>\n, then for each turn
    # <|user|>\n…<|end|><|assistant|>\n…<|end|>
    "phi3": _Layout(
        system=("\nYou are an AI assistant whose name is Phi-3.", "\n"),
        before_question="\n",
        after_question=("\n",),
        system_controls=3,
        turn_controls=4,
    ),
}


class TokenRules(msgspec.Struct, frozen=True):
    """How a base turns rows into tokens. ``tiling`` is xtuner's for it."""

    tiling: Tiling
    tokens_per_tile: int
    family: Family = "internlm2"


class RowLengths:
    """Counts the tokens of rows: exactly with ``count_tokens``, else never too few.

    Without a tokenizer every byte of UTF-8 counts as a token, and each text for one more: no
    tokenizer that can spell any byte needs more.
    """

    def __init__(self, rules: TokenRules, count_tokens: CountTokens | None = None) -> None:
        self.is_exact = count_tokens is not None and rules.family == "internlm2"
        self._rules = rules
        self._count = count_tokens or _most_tokens
        self._layout = _LAYOUTS[rules.family]
        layout = self._layout
        self._fixed = layout.system_controls + sum(map(self._count, layout.system))
        self._per_turn = layout.turn_controls + sum(map(self._count, layout.after_question))

    def tokens(self, row: Row, size: tuple[int, int] | None) -> int:
        """All tokens of a row whose image, if any, has this upright width and height."""
        total = self._fixed
        for index, turn in enumerate(row.turns):
            if turn.role == "gpt":
                total += self._count(turn.text)
            elif size is not None and index == row.image_turn:
                total += self._per_turn + self._with_image(turn.text, size)
            else:
                total += self._per_turn + self._count(self._layout.before_question + turn.text)
        return total

    def _with_image(self, text: str, size: tuple[int, int]) -> int:
        tiles = tile_count(*size, self._rules.tiling)
        # One image start and one image end around the context tokens.
        image = 2 + tiles * self._rules.tokens_per_tile
        after = self._count("\n" + text) if text else 0
        return self._count(self._layout.before_question) + image + after


def _most_tokens(text: str) -> int:
    return len(text.encode()) + 1
