"""How many tokens a row takes, so that xtuner never has to cut one.

Counts what xtuner's InternVL dataset builds: the system prompt that it always sets, each question
in the model's chat template with the image's context tokens in front, each answer with its end.
Source: ``xtuner.dataset.internvl_dataset`` 0.2.0 and its templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from shared.tunable import TRAINED_SYSTEM
from workers.inference.engines.base import Tiling
from workers.inference.tiling import tile_count
from workers.training.rows import CONTROL_TOKENS, Row

CountTokens = Callable[[str], int]
"""How many tokens a text takes in the base's tokenizer, each control token in it one; none added."""

Family = Literal["internlm2", "phi3"]

_BEGIN = "<s>"
_CONTEXT = "<IMG_CONTEXT>"
_IMAGE = f"<img>{_CONTEXT}</img>"
_CONTROLS = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))


class _Layout(msgspec.Struct, frozen=True):
    """The texts around what a row says, control tokens included."""

    system: str
    before_question: str
    after_question: str
    after_answer: str


_LAYOUTS: dict[Family, _Layout] = {
    "internlm2": _Layout(
        system=f"<|im_start|>system\n{TRAINED_SYSTEM['InternLM2ForCausalLM']}<|im_end|>",
        before_question="<|im_start|>user\n",
        after_question="<|im_end|><|im_start|>assistant\n",
        after_answer="<|im_end|>",
    ),
    "phi3": _Layout(
        system=f"<|system|>\n{TRAINED_SYSTEM['Phi3ForCausalLM']}<|end|>\n",
        before_question="<|user|>\n",
        after_question="<|end|><|assistant|>\n",
        after_answer="<|end|>",
    ),
}


def controls_of(family: Family) -> set[str]:
    """The control tokens that the tokenizer of such a base must know."""
    layout = _LAYOUTS[family]
    return set(_CONTROLS.findall(_BEGIN + _IMAGE + "".join(msgspec.structs.astuple(layout))))


class TokenRules(msgspec.Struct, frozen=True):
    """How a base turns rows into tokens. ``tiling`` is xtuner's for it."""

    tiling: Tiling
    tokens_per_tile: int
    family: Family = "internlm2"


class RowLengths:
    """Counts the tokens of rows: exactly with ``count_tokens``, else never too few.

    Without a tokenizer every byte of UTF-8 counts as a token, and each text between two control
    tokens for one more: no tokenizer that can spell any byte needs more.
    """

    def __init__(self, rules: TokenRules, count_tokens: CountTokens | None = None) -> None:
        self.is_exact = count_tokens is not None
        self._rules = rules
        self._count = count_tokens or _most_tokens
        self._layout = _LAYOUTS[rules.family]

    def tokens(self, row: Row, size: tuple[int, int] | None) -> int:
        """All tokens of a row whose image, if any, has this upright width and height."""
        layout, total = self._layout, 0
        for index, turn in enumerate(row.turns):
            if turn.role == "gpt":
                total += self._count(turn.text + layout.after_answer)
                continue
            text = turn.text
            if size is not None and index == row.image_turn:
                text = f"{_IMAGE}\n{text}" if text else _IMAGE
                # One of the context tokens is in the text.
                total += tile_count(*size, self._rules.tiling) * self._rules.tokens_per_tile - 1
            before = "" if index else _BEGIN + layout.system
            # As a whole: what a tokenizer makes of a text may depend on the token before it.
            total += self._count(before + layout.before_question + text + layout.after_question)
        return total


def _most_tokens(text: str) -> int:
    between = _CONTROLS.split(text)
    return len(between) - 1 + sum(len(part.encode()) + 1 for part in between if part)
