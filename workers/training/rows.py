"""A row as it is trained on, and the rules that every row must meet, whatever its format.

xtuner's dataset skips, joins, cuts or replaces what it does not like without a word (a turn out of
order, a second image, an image without its tag, a spelled control token). What is refused here is
all of that, so that nothing but what the report says is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from shared.errors import RowUnusable
from workers.inference.image_files import shown

IMAGE_TAG = "<image>"

CONTROL_TOKENS = (
    IMAGE_TAG,
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|action_start|>",
    "<|action_end|>",
    "<|interpreter|>",
    "<|plugin|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|endoftext|>",
    *(f"<|placeholder{number}|>" for number in range(1, 7)),
)
"""Texts that xtuner, or the tokenizers of InternLM2 and Phi-3, take for something else than text."""

MAX_ADDRESS = 4096
"""Longest name or URL of an image, in characters."""

Role = Literal["human", "gpt"]


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """One message. ``text`` has no white space around it, as xtuner strips it."""

    role: Role
    text: str


class Row(msgspec.Struct, frozen=True):
    """A conversation, and at most one image: its address, and which turn shows it."""

    turns: list[Turn]
    image: str | None = None
    image_turn: int = 0
    notes: tuple[str, ...] = ()
    """What is not used as it was written; counted in the report."""


def check_row(row: Row) -> Row:
    """The row, if it can be trained on. Raises: RowUnusable."""
    _check_roles([turn.role for turn in row.turns])
    for index, turn in enumerate(row.turns):
        where = f"turn {index + 1}"
        check_text(turn.text, where)
        shows_image = row.image is not None and index == row.image_turn
        if not turn.text and not shows_image:
            what = "answer" if turn.role == "gpt" else "question"
            raise RowUnusable(f"the {what} is empty", param=where, reason=f"empty_{what}")
    return row


def check_text(text: str, where: str) -> None:
    """Refuse what a tokenizer would not take for text. Raises: RowUnusable."""
    if "\0" in text:
        raise RowUnusable(
            "the text holds a NUL character; remove it", param=where, reason="invalid_text"
        )
    if "<" not in text:
        return
    for token in CONTROL_TOKENS:
        if token in text:
            raise RowUnusable(
                f"the text spells {token}, which the model would not read as text; write it "
                "otherwise",
                param=where,
                reason="control_token",
            )


def only_image(addresses: Sequence[str], where: str) -> str | None:
    """The row's image, if any. Raises: RowUnusable for several or an unusable address."""
    if len(addresses) > 1:
        raise RowUnusable(
            f"the row shows {len(addresses)} images and training takes one; make it several rows",
            param=where,
            reason="several_images",
        )
    if not addresses:
        return None
    address = addresses[0]
    is_too_long = len(address) > MAX_ADDRESS and address[:5].lower() != "data:"
    if not address or "\0" in address or is_too_long:
        raise RowUnusable(f"{shown(address)} names no image", param=where, reason="image_not_found")
    return address


def _check_roles(roles: Sequence[Role]) -> None:
    expected: Iterable[Role] = ("human", "gpt") * (len(roles) // 2 + 1)
    for index, (role, wanted) in enumerate(zip(roles, expected, strict=False)):
        if role != wanted:
            raise RowUnusable(
                "questions and answers must take turns, a question first",
                param=f"turn {index + 1}",
                reason="roles_out_of_order",
            )
    if len(roles) % 2 or not roles:
        raise RowUnusable(
            "the last message must be an answer to learn", param="turns", reason="no_answer"
        )
