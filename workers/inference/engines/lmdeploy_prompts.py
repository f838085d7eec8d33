"""From a prompt to what lmdeploy takes.

Two ways: messages with decoded pictures, for any model, which lmdeploy prepares itself; and ready
token ids with ready pixel values, for InternVL models with images that were cut beforehand, where
nothing is left for lmdeploy to prepare.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from shared.errors import InvalidValue
from workers.inference.engines.base import Image, Prompt, Tiling, Turn
from workers.inference.internvl.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    decode,
    open_image,
    tiles_in,
)

LOW_DETAIL_PX = 448
"""The longer side of an image of low detail, for models without tiles."""

Message = dict[str, Any]
"""A message as lmdeploy takes it; ``content`` is a text or a list of parts."""


MAX_REMEMBERED = 256
MAX_REMEMBERED_CHARACTERS = 16_384
"""Longer texts are hardly asked twice."""

Segments = tuple[tuple[int, ...], ...]
"""The token ids before, between and behind the images of a prompt."""


def messages_of(prompt: Prompt, *, tiled: bool) -> list[Message]:
    """A prompt as lmdeploy takes it, its images decoded to their last pixel.

    ``tiled`` says that the model cuts images into tiles and lets a request limit their number;
    otherwise an image of low detail is made smaller here. Raises: ImageError, InvalidValue.
    """
    return [_message(turn, prompt.images, tiled=tiled) for turn in prompt.turns]


def _message(turn: Turn, images: Sequence[Image], *, tiled: bool) -> Message:
    return _as_message(turn, _content(turn, lambda index: _image_part(index, images, tiled=tiled)))


def _as_message(turn: Turn, content: list[Message]) -> Message:
    if all(part["type"] == "text" for part in content):
        return {"role": turn.role, "content": "".join(part["text"] for part in content)}
    return {"role": turn.role, "content": content}


def _content(turn: Turn, image_part: Callable[[int], Message]) -> list[Message]:
    content: list[Message] = []
    for number, part in enumerate(turn.parts):
        if isinstance(part, int):
            content.append(image_part(part))
            continue
        last = number == len(turn.parts) - 1
        # lmdeploy joins parts without anything between them.
        text = part if last or part.endswith((" ", "\n")) else f"{part}\n"
        content.append({"type": "text", "text": text})
    return content


def _image_at(index: int, images: Sequence[Image]) -> Image:
    if not 0 <= index < len(images):
        raise InvalidValue(f"a message refers to image {index}, which the request does not hold")
    return images[index]


def _image_part(index: int, images: Sequence[Image], *, tiled: bool) -> Message:
    image = _image_at(index, images)
    picture = decode(open_image(image))
    data: dict[str, Any] = {"data": picture}
    if image.detail == "low" and tiled:
        data["max_dynamic_patch"] = 1
    elif image.detail == "low":
        picture.thumbnail((LOW_DETAIL_PX, LOW_DETAIL_PX), Pillow.Resampling.BICUBIC)
    return {"type": "image_data", "image_data": data}


class ReadyPrompts:
    """Makes requests of prompts whose images are tiles already, for lmdeploy's InternVL models.

    The texts of a prompt are rendered and encoded once, however many images they are asked about.
    ``segments`` and ``inputs`` belong to lmdeploy's loop; ``pixels`` may run in any thread.
    """

    def __init__(self, engine: Any, tiling: Tiling) -> None:
        self.tiling = tiling
        self._engine = engine
        self._model = engine.vl_encoder.model
        self._remembered: OrderedDict[Any, Segments] = OrderedDict()

    @staticmethod
    def fits(prompt: Prompt) -> bool:
        """Whether the prompt has images, and all of them are tiles."""
        return bool(prompt.images) and all(i.encoding == "tiles" for i in prompt.images)

    def require_plain(self, prompt: Prompt) -> None:
        """Refuse texts that spell out the token which stands for a piece of an image.

        lmdeploy's PyTorch engine puts image features wherever that token is, in all prompts of a
        step, so one such text would shift the images of others. Raises: InvalidValue.
        """
        token = self._model.image_token
        texts = (part for turn in prompt.turns for part in turn.parts if isinstance(part, str))
        if any(token in text for text in texts):
            raise InvalidValue(f"a message may not contain '{token}'", param="messages")

    def pixels(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The images in the order they are shown, as the model's encoder takes them.

        Raises: ImageError, InvalidValue.
        """
        made: dict[int, dict[str, Any]] = {}
        shown = [part for turn in prompt.turns for part in turn.parts if isinstance(part, int)]
        for index in shown:
            if index not in made:
                made[index] = self._encoder_input(_image_at(index, prompt.images))
        return [dict(made[index]) for index in shown]

    def inputs(self, prompt: Prompt, pixels: list[dict[str, Any]]) -> dict[str, Any]:
        """What lmdeploy's engines take: token ids, and where among them the images stand.

        Raises: InvalidValue.
        """
        segments = self.segments(prompt)
        ids = list(segments[0])
        for image, segment in zip(pixels, segments[1:], strict=True):
            image["offset"] = len(ids)
            ids += [image["image_token_id"]] * image["image_tokens"]
            ids += segment
        return {"prompt": None, "input_ids": ids, "multimodal": pixels}

    def segments(self, prompt: Prompt) -> Segments:
        """The token ids around the images. Raises: InvalidValue."""
        key = tuple(
            (turn.role, tuple(part if isinstance(part, str) else None for part in turn.parts))
            for turn in prompt.turns
        )
        found = self._remembered.get(key)
        if found is not None:
            self._remembered.move_to_end(key)
            return found
        found = self._encoded(prompt.turns)
        if sum(len(text) for _, parts in key for text in parts if text) < MAX_REMEMBERED_CHARACTERS:
            self._remembered[key] = found
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return found

    def _encoded(self, turns: Sequence[Turn]) -> Segments:
        messages = [
            _as_message(turn, _content(turn, lambda _: {"type": "image"})) for turn in turns
        ]
        text, mark = self._model.proc_messages(messages, self._engine.chat_template)
        pieces = text.split(mark)
        images = sum(isinstance(part, int) for turn in turns for part in turn.parts)
        if len(pieces) != images + 1:
            # A text holds lmdeploy's older mark, <IMAGE_TOKEN>, which is turned into this one.
            raise InvalidValue(f"a message may not contain '{mark}'", param="messages")
        encode = self._engine.tokenizer.encode
        return tuple(
            tuple(encode(piece, add_bos=number == 0)) for number, piece in enumerate(pieces)
        )

    def _encoder_input(self, image: Image) -> dict[str, Any]:
        tiles = tiles_in(image, self.tiling.tile_px)
        return {
            "pixel_values": _normalized(tiles, self._model.mm_feature_dtype),
            "image_tokens": len(tiles) * self._model.image_tokens_per_patch,
            "image_token_id": self._model.image_token_id,
            "image_size": (image.width, image.height),
            # lmdeploy would otherwise hash the pixels on its event loop, twice as many bytes.
            "fingerprint": hashlib.sha256(image.data).digest(),
        }


def _normalized(tiles: Any, dtype: Any) -> Any:
    """``[tiles, 3, side, side]``, by the very operations of the published preprocessing."""
    import torch

    def channels(values: Sequence[float]) -> Any:
        return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)

    # Copied: torch shares no memory that may not be written.
    pixels = torch.from_numpy(np.array(tiles)).permute(0, 3, 1, 2).contiguous()
    values = pixels.to(torch.float32).div_(255)
    return values.sub_(channels(IMAGENET_MEAN)).div_(channels(IMAGENET_STD)).to(dtype)
