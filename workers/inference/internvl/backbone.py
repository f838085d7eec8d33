"""A loaded network as the decoding batch sees it: rows join with a prompt, step, and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import RowCache
from .config import ModelConfig
from .model import InternVL
from .preprocess import IMAGENET_MEAN, IMAGENET_STD

Tiles = NDArray[np.uint8]
"""``[tiles, side, side, 3]``, the tiles of all images of a prompt in their order."""

_TILES_AT_ONCE = 16


class Backbone(Protocol):
    """What decodes. Row numbers are positions: when a row leaves, the last takes its place."""

    def join(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Tiles]) -> Tensor:
        """Append one row per prompt; returns their next logits ``[prompts, vocab]``.

        On failure no row is added.
        """
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Extend every row by its token; returns the next logits ``[rows, vocab]``."""
        ...

    def leave(self, row: int) -> None:
        """Drop a row."""
        ...

    def clear(self) -> None:
        """Drop every row."""
        ...


def normalized(tiles: Tiles, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tiles to the ViT's input ``[tiles, 3, side, side]``: ImageNet's mean and deviation."""
    pixels = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    deviation = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    return ((pixels - mean) / deviation).to(dtype)


class BuiltInBackbone:
    """This project's own network; all rows step as one batch."""

    def __init__(
        self, model: InternVL, image_token: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._image_token = image_token
        self._dtype = dtype
        self._device = device
        self._cache = RowCache(model.config.language, dtype, device)

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Tiles]) -> Tensor:
        """See :class:`Backbone`."""
        held = len(self._cache.lengths)
        try:
            return self._prefill(prompts, np.concatenate(list(tiles)))
        except BaseException:
            while len(self._cache.lengths) > held:
                self._cache.leave(len(self._cache.lengths) - 1)
            raise

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """See :class:`Backbone`."""
        language = self._model.language_model
        embeds = language.embed(torch.tensor(tokens, device=self._device)[:, None])
        positions, attend = self._cache.step()
        logits: Tensor = language(embeds, positions, attend)
        return logits[:, 0]

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """See :class:`Backbone`."""
        self._cache.leave(row)

    def clear(self) -> None:
        """See :class:`Backbone`."""
        self._cache.clear()

    def _prefill(self, prompts: Sequence[Sequence[int]], tiles: Tiles) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self._device)
        language = self._model.language_model
        embeds = language.embed(ids)
        if len(tiles):
            embeds[ids == self._image_token] = self._features(tiles)
        positions = torch.arange(ids.shape[1], device=self._device).expand(len(ids), -1)
        hidden = language.model(embeds, positions, self._cache.join(lengths))
        last = torch.tensor(lengths, device=self._device) - 1
        logits: Tensor = language.output(hidden[torch.arange(len(ids)), last]).float()
        return logits

    def _features(self, tiles: Tiles) -> Tensor:
        return torch.cat(
            [
                self._model.extract_feature(
                    normalized(tiles[first : first + _TILES_AT_ONCE], self._dtype, self._device)
                ).flatten(0, 1)
                for first in range(0, len(tiles), _TILES_AT_ONCE)
            ]
        )


class PublishedBackbone:
    """A network whose code came with its checkpoint, through its published interface.

    Its cache cannot be taken apart, so each row steps alone: correct, and slower than the
    built-in one.
    """

    def __init__(
        self, model: Any, image_token: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._image_token = image_token
        self._dtype = dtype
        self._device = device
        self._pasts: list[Any] = []
        self._lengths: list[int] = []

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], tiles: Sequence[Tiles]) -> Tensor:
        """See :class:`Backbone`."""
        outputs = [self._prefill(*pair) for pair in zip(prompts, tiles, strict=True)]
        self._pasts += [output.past_key_values for output in outputs]
        self._lengths += [len(prompt) for prompt in prompts]
        return torch.cat([output.logits[:, -1].float() for output in outputs])

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """See :class:`Backbone`."""
        return torch.cat([self._advance(row, token) for row, token in enumerate(tokens)])

    def leave(self, row: int) -> None:
        """See :class:`Backbone`."""
        last_past, last_length = self._pasts.pop(), self._lengths.pop()
        if row < len(self._pasts):
            self._pasts[row], self._lengths[row] = last_past, last_length

    def clear(self) -> None:
        """See :class:`Backbone`."""
        self._pasts, self._lengths = [], []

    def _prefill(self, prompt: Sequence[int], tiles: Tiles) -> Any:
        ids = torch.tensor([list(prompt)], device=self._device)
        embeds = self._model.language_model.get_input_embeddings()(ids).clone()
        if len(tiles):
            features = self._model.extract_feature(normalized(tiles, self._dtype, self._device))
            embeds[ids == self._image_token] = features.flatten(0, 1)
        return self._forward(embeds, 0, None)

    def _advance(self, row: int, token: int) -> Tensor:
        ids = torch.tensor([[token]], device=self._device)
        embeds = self._model.language_model.get_input_embeddings()(ids)
        output = self._forward(embeds, self._lengths[row], self._pasts[row])
        self._pasts[row] = output.past_key_values
        self._lengths[row] += 1
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _forward(self, embeds: Tensor, past_length: int, past: Any) -> Any:
        length = past_length + embeds.shape[1]
        return self._model.language_model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, length, dtype=torch.long, device=self._device),
            position_ids=torch.arange(past_length, length, device=self._device)[None],
            past_key_values=past,
            use_cache=True,
            return_dict=True,
        )


def no_tiles(config: ModelConfig) -> Tiles:
    """The tiles of a prompt without images."""
    return np.zeros((0, config.tile_px, config.tile_px, 3), dtype=np.uint8)
