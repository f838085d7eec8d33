"""From a chat request to what an engine is asked: defaults filled in, images read and verified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

from shared.chat import ChatRequest, ImagePart, Message
from shared.errors import ImageError, ImageTooLarge, InvalidValue
from shared.models import ModelDefaults
from shared.settings import ImageSettings
from workers.inference.engines.base import Detail, Image, Prompt, Sampling, Turn

N = TypeVar("N", int, float)

ReadImage = Callable[[str, Detail], Image]
"""Gets an image's URL and detail; raises ImageError."""


def build_prompt(
    prompt_id: int,
    request: ChatRequest,
    defaults: ModelDefaults,
    read_image: ReadImage,
    *,
    limits: ImageSettings,
) -> Prompt:
    """Make the prompt of a request; one without a system message gets the model's, if it has one.

    Raises: ImageError with ``param`` naming the part; InvalidValue for too many images.
    """
    images: list[Image] = []
    turns = [
        _turn(message, f"messages[{index}]", images, read_image, limits)
        for index, message in enumerate(request.messages)
    ]
    if defaults.system is not None and turns[0].role != "system":
        turns.insert(0, Turn("system", [defaults.system]))
    return Prompt(prompt_id, turns, _sampling(request, defaults), images)


def _turn(
    message: Message,
    where: str,
    images: list[Image],
    read_image: ReadImage,
    limits: ImageSettings,
) -> Turn:
    role: Literal["system", "user", "assistant"] = (
        "system" if message.role == "developer" else message.role
    )
    if isinstance(message.content, str):
        return Turn(role, [message.content])
    parts: list[str | int] = []
    for index, part in enumerate(message.content):
        if not isinstance(part, ImagePart):
            parts.append(part.text)
            continue
        if len(images) >= limits.max_per_request:
            raise InvalidValue(
                f"a request may hold {limits.max_per_request} images; this one has more",
                param="messages",
            )
        try:
            images.append(read_image(part.image_url.url, part.image_url.detail))
            if sum(image.source_bytes for image in images) > limits.max_request_bytes:
                raise ImageTooLarge(
                    f"the images of this request are larger than {limits.max_request_bytes} "
                    "bytes together"
                )
        except ImageError as error:
            error.param = f"{where}.content[{index}].image_url.url"
            raise
        parts.append(len(images) - 1)
    return Turn(role, parts)


def _sampling(request: ChatRequest, defaults: ModelDefaults) -> Sampling:
    return Sampling(
        max_tokens=_given(request.token_limit, defaults.max_tokens),
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=_given(request.top_k, defaults.top_k),
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        min_new_tokens=request.min_new_tokens or 0,
        stop=request.stop_strings,
        seed=request.seed,
    )


def _given(value: N | None, default: N) -> N:
    return default if value is None else value
