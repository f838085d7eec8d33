"""The ``internlm2-chat`` conversation template: turns to the pieces a tokenizer encodes.

Text and control tokens stay apart until they are ids, so a user's text that spells a control
token is only text. An image stands where its part stands in the turn, with a line break between
it and what comes next to it.

Source: the conversation template published with InternVL2; the system prompt is the one that
fine-tuning with xtuner uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.tunable import TRAINED_SYSTEM
from workers.inference.engines.base import Turn

SYSTEM_PROMPT = TRAINED_SYSTEM["InternLM2ForCausalLM"]

BEGIN = "<s>"
END = "</s>"
UNKNOWN = "<unk>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Control:
    """A control token, repeated ``count`` times."""

    token: str
    count: int = 1


Piece = str | Control


class Vocabulary(Protocol):
    """What the template needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens spelled in it are not understood."""
        ...

    def control(self, token: str) -> int:
        """The id of a control token."""
        ...


def render(turns: Sequence[Turn], image_tokens: Sequence[int]) -> list[Piece]:
    """Lay out a conversation up to where the assistant answers.

    ``image_tokens[i]`` is how many context tokens image ``i`` takes. Without a system turn at
    the start, the default system prompt stands there.
    """
    if not turns or turns[0].role != "system":
        turns = [Turn("system", [SYSTEM_PROMPT]), *turns]
    pieces: list[Piece] = [Control(BEGIN)]
    for turn in turns:
        pieces += [Control(TURN_START), f"{turn.role}\n"]
        pieces += _content(turn.parts, image_tokens)
        pieces.append(Control(TURN_END))
    return [*pieces, Control(TURN_START), "assistant\n"]


def encode(pieces: Sequence[Piece], vocabulary: Vocabulary) -> list[int]:
    """The ids of a rendered conversation; neighbouring texts are encoded as one."""
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            ids += vocabulary.encode(text)
            text = ""
        ids += [vocabulary.control(piece.token)] * piece.count
    return ids + (vocabulary.encode(text) if text else [])


def _content(parts: Sequence[str | int], image_tokens: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for index, part in enumerate(parts):
        before = parts[index - 1] if index else None
        if before is not None and not str(before).endswith((" ", "\n")):
            pieces.append("\n")
        if isinstance(part, str):
            pieces.append(part)
        else:
            pieces += [
                Control(IMAGE_START),
                Control(IMAGE_CONTEXT, image_tokens[part]),
                Control(IMAGE_END),
            ]
    return pieces
