"""From the text of a row to a :class:`~workers.training.rows.Row`, one function per format.

Each raises RowUnusable that names the field. Fields that say nothing about training are passed
over; those that ask for something xtuner does not do are refused.
Sources: OpenAI's public API specification 2.3.0 (``FineTuneChatRequestInput``), the data format
published with LLaVA, and the fields of FoodieQA's ``sivqa_tidy.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import msgspec

from shared.chat import ImagePart, Message, TextPart, explain
from shared.errors import DatasetFormatUnclear, DatasetInvalid, RowUnusable, TooFewRows
from shared.finetunes import DataFormat
from workers.inference.batch_lines import UNREADABLE
from workers.training.rows import IMAGE_TAG, Row, Turn, check_row, only_image

Parse = Callable[[bytes], Row]

_DETECTED_FROM_ROWS = 20


# --- OpenAI's chat format ---------------------------------------------------------------------


class _WeightedMessage(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    weight: float | None = None


class _OpenAiRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[_WeightedMessage]


_openai = msgspec.json.Decoder(_OpenAiRow)


def parse_openai(text: bytes) -> Row:
    """A line ``{"messages": [...]}``."""
    return row_of_messages(_decoded(_openai, text).messages)


def row_of_messages(messages: Sequence[Message]) -> Row:
    """The row of a chat, whose last message is the answer. Raises: RowUnusable."""
    turns: list[Turn] = []
    images: list[str] = []
    notes: set[str] = set()
    image_turn = 0
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _require_trained(message, where)
        if message.role in {"system", "developer"}:
            notes.add("system_prompt_left_out")
            continue
        parts = [TextPart(message.content)] if isinstance(message.content, str) else message.content
        found = [part for part in parts if isinstance(part, ImagePart)]
        if found:
            _require_user(message, f"{where}.content")
            images += [part.image_url.url for part in found]
            image_turn = len(turns)
            if not isinstance(parts[0], ImagePart):
                notes.add("image_moved_to_front")
            if any(part.image_url.detail != "auto" for part in found):
                notes.add("detail_ignored")
        text = _joined([part.text for part in parts if isinstance(part, TextPart)])
        turns.append(Turn("gpt" if message.role == "assistant" else "human", text))
    image = only_image(images, "messages")
    return check_row(Row(turns, image, image_turn, tuple(sorted(notes))))


def _require_trained(message: Message, where: str) -> None:
    if isinstance(message, _WeightedMessage) and message.weight not in {None, 1}:
        raise RowUnusable(
            "all answers of a row are learned alike; leave 'weight' out, or the row",
            param=f"{where}.weight",
            reason="unsupported_field",
        )


def _require_user(message: Message, where: str) -> None:
    if message.role != "user":
        raise RowUnusable(
            f"only user messages may hold images, this one is from '{message.role}'",
            param=where,
            reason="image_in_answer",
        )


def _joined(texts: Sequence[str]) -> str:
    """Texts of one message as serving joins them: on lines of their own."""
    whole = ""
    for text in texts:
        if whole and not whole.endswith((" ", "\n")):
            whole += "\n"
        whole += text
    return whole.strip()


# --- LLaVA ------------------------------------------------------------------------------------


class _LlavaTurn(msgspec.Struct, frozen=True):
    said_by: str = msgspec.field(name="from")
    value: str


class _LlavaRow(msgspec.Struct, frozen=True):
    conversations: list[_LlavaTurn]
    image: str | list[str] | None = None
    system: str | None = None
    video: Any = None


_llava = msgspec.json.Decoder(_LlavaRow)
_LLAVA_ROLES: dict[str, str] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}


def parse_llava(text: bytes) -> Row:
    """A row ``{"image": ..., "conversations": [{"from": "human", "value": ...}, ...]}``."""
    found = _decoded(_llava, text)
    if found.video is not None:
        raise RowUnusable("videos are not supported", param="video", reason="unsupported_field")
    addresses = [found.image] if isinstance(found.image, str) else found.image or []
    image = only_image(addresses, "image")
    notes = {"system_prompt_left_out"} if found.system else set()
    turns: list[Turn] = []
    tagged: list[int] = []
    for index, said in enumerate(found.conversations):
        role = _LLAVA_ROLES.get(said.said_by)
        if role is None:
            raise RowUnusable(
                "'from' must be human or gpt",
                param=f"conversations[{index}].from",
                reason="unknown_role",
            )
        if role == "system":
            notes.add("system_prompt_left_out")
            continue
        value = said.value
        if role == "human":
            tagged += [len(turns)] * value.count(IMAGE_TAG)
            if IMAGE_TAG in value and not value.lstrip().startswith(IMAGE_TAG):
                notes.add("image_moved_to_front")
            value = value.replace(IMAGE_TAG, "")
        turns.append(Turn("human" if role == "human" else "gpt", value.strip()))
    _check_tags(len(tagged), has_image=image is not None)
    return check_row(Row(turns, image, tagged[0] if tagged else 0, tuple(sorted(notes))))


def _check_tags(tags: int, *, has_image: bool) -> None:
    if tags > 1:
        raise RowUnusable(
            f"{IMAGE_TAG} stands {tags} times in the questions and training takes one image",
            param="conversations",
            reason="several_images",
        )
    if tags and not has_image:
        raise RowUnusable(
            f"a question says {IMAGE_TAG} and the row has no 'image'",
            param="image",
            reason="image_missing",
        )
    if has_image and not tags:
        raise RowUnusable(
            f"no question says {IMAGE_TAG}, so the image would never be looked at",
            param="conversations",
            reason="image_tag_missing",
        )


# --- FoodieQA ---------------------------------------------------------------------------------


class _Dish(msgspec.Struct, frozen=True):
    food_file: str | None = None
    food_name: str | None = None


class _FoodieRow(msgspec.Struct, frozen=True):
    question: str
    choices: list[str] | str
    answer: int | str
    food_meta: _Dish = _Dish()
    food_file: str | None = None
    food_name: str | None = None
    images: list[str] = []


_foodieqa = msgspec.json.Decoder(_FoodieRow)
_COMMAS = re.compile(r"[,，]")


def parse_foodieqa(text: bytes) -> Row:
    """A question of ``sivqa_tidy.json``: the answer is the right choice and the dish's name."""
    found = _decoded(_foodieqa, text)
    only_image(found.images, "images")  # the questions of mivqa_tidy.json show four
    file = found.food_meta.food_file or found.food_file
    name = found.food_meta.food_name or found.food_name
    if not file:
        raise RowUnusable(
            "the row has no food_meta.food_file",
            param="food_meta.food_file",
            reason="image_missing",
        )
    if not name or not name.strip():
        raise RowUnusable(
            "the row has no food_meta.food_name",
            param="food_meta.food_name",
            reason="invalid_value",
        )
    answer = f"{_choice(found)}，图中的菜是{name.strip()}"
    turns = [Turn("human", found.question.strip()), Turn("gpt", answer)]
    return check_row(Row(turns, only_image([file], "food_meta.food_file")))


def _choice(row: _FoodieRow) -> str:
    choices = _COMMAS.split(row.choices) if isinstance(row.choices, str) else row.choices
    try:
        index = int(row.answer)
    except ValueError:
        index = -1
    if not 0 <= index < len(choices):
        raise RowUnusable(
            f"'answer' must be the number of a choice, 0 to {len(choices) - 1}",
            param="answer",
            reason="invalid_value",
        )
    choice = choices[index].strip()
    if not choice:
        raise RowUnusable("the right choice is empty", param="choices", reason="empty_answer")
    return choice


# --- all of them ------------------------------------------------------------------------------

PARSERS: dict[str, Parse] = {
    "openai": parse_openai,
    "llava": parse_llava,
    "foodieqa": parse_foodieqa,
}

_SIGNS: dict[DataFormat, frozenset[str]] = {
    "openai": frozenset({"messages"}),
    "llava": frozenset({"conversations"}),
    "foodieqa": frozenset({"question", "choices", "answer"}),
}
_NAMES = (
    "openai ('messages'), llava ('conversations') or foodieqa ('question', 'choices', 'answer')"
)


def detect(rows: Iterable[bytes], param: str) -> DataFormat:
    """Which format the first rows of a file have; ``param`` names the file in errors.

    Raises: DatasetFormatUnclear that names what was found; DatasetInvalid for a file of a batch;
    TooFewRows if there are none.
    """
    found: set[DataFormat] = set()
    text = None
    for text in islice(rows, _DETECTED_FROM_ROWS):
        keys = _keys(text)
        if "custom_id" in keys:
            raise DatasetInvalid(
                "these are the lines of a batch; give the id of the finished batch itself "
                "(batch_...) in place of its file",
                param=param,
            )
        found |= {name for name, signs in _SIGNS.items() if signs <= keys}
    if text is None:
        raise TooFewRows("the file holds no rows", param=param)
    if len(found) == 1:
        return found.pop()
    if found:
        raise DatasetFormatUnclear(
            f"the rows look like {' and '.join(sorted(found))} at once; name one in 'format'",
            param=param,
        )
    raise DatasetFormatUnclear(
        f"the first rows have the fields of no format that is known: {_NAMES}; a row is a line with "
        "one JSON object, or an element of one JSON array",
        param=param,
    )


def _keys(text: bytes) -> set[str]:
    try:
        row = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except UNREADABLE:
        return set()
    return set(row)


def _decoded(decoder: msgspec.json.Decoder[Any], text: bytes) -> Any:
    if not text:
        raise RowUnusable("the row is longer than this server reads", reason="row_too_long")
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        found = explain(error)
        message = found.message.replace("the body", "the row", 1)
        raise RowUnusable(message, param=found.param, reason=found.code) from None
    except UNREADABLE as error:
        raise RowUnusable(f"the row is not valid JSON: {error}", reason="invalid_json") from None
