"""The features of a frozen ViT, computed once per image and read back in every epoch.

What is kept is the projector's input, ``[tiles, tokens, channels]`` in bfloat16, because the projector
itself is trained. For InternVL2-2B that is 2.1 MB per tile, so a picture of thirteen tiles takes 27 MB.
Each process computes its share and writes one file; all read all of them through the page cache.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from mmengine.dist import barrier, get_rank, get_world_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shared.storage import write_json


class Entry(msgspec.Struct, frozen=True):
    """Where the features of one image lie: bytes from ``start`` on in the file of its share."""

    share: int
    start: int
    shape: tuple[int, int, int]


class ShareIndex(msgspec.Struct, frozen=True):
    """``INDEX-of-COUNT.json``, written when the share's file is whole."""

    entries: dict[str, Entry]


class FeatureCache:
    """Reads features by image path."""

    def __init__(self, folder: Path, shares: int) -> None:
        self._entries: dict[str, Entry] = {}
        for share in range(shares):
            text = _index_path(folder, share, shares).read_bytes()
            self._entries |= msgspec.json.decode(text, type=ShareIndex).entries
        self._files = [
            np.memmap(path, np.int16, "r") if path.stat().st_size else np.empty(0, np.int16)
            for path in (_data_path(folder, share, shares) for share in range(shares))
        ]

    def __contains__(self, image: str) -> bool:
        return image in self._entries

    @property
    def tile_shape(self) -> tuple[int, int]:
        """Tokens and channels of one tile."""
        _, tokens, channels = next(iter(self._entries.values())).shape
        return tokens, channels

    def read(self, image: str) -> Tensor:
        """``[tiles, 1, tokens, channels]``; the four dimensions that pixels have."""
        entry = self._entries[image]
        start = entry.start // 2
        stored = self._files[entry.share][start : start + int(np.prod(entry.shape))]
        return torch.from_numpy(stored.copy()).view(torch.bfloat16).reshape(entry.shape)[:, None]


def can_cache(model: Any) -> bool:
    """Whether the ViT gives the same features in every epoch: frozen, and without dropout."""
    vision = model.model.vision_model
    config = vision.config
    chances = ("drop_path_rate", "dropout", "attention_dropout")
    return not any(p.requires_grad for p in vision.parameters()) and not any(
        getattr(config, name, 0.0) for name in chances
    )


def fill_cache(model: Any, dataset: Any, folder: Path, *, loaders: int) -> FeatureCache:
    """Compute what is missing, all processes together, and open the cache."""
    folder.mkdir(parents=True, exist_ok=True)
    share, shares = get_rank(), get_world_size()
    if not _index_path(folder, share, shares).is_file():
        _write_share(model, dataset, folder, share, shares, loaders)
    barrier()
    return FeatureCache(folder, shares)


def read_features_only(model: Any) -> None:
    """From now on the model is given features where it was given pixels."""

    def extract_feature(self: Any, pixel_values: Tensor) -> Any:
        return self.mlp1(pixel_values.squeeze(1))

    model.model.extract_feature = types.MethodType(extract_feature, model.model)


def _write_share(
    model: Any, dataset: Any, folder: Path, share: int, shares: int, loaders: int
) -> None:
    images = sorted({path for path in dataset.images() if path is not None})[share::shares]
    entries: dict[str, Entry] = {}
    start = 0
    device = next(model.parameters()).device
    with open(_data_path(folder, share, shares), "wb") as stream:
        for image, pixels in _decoded(dataset, images, loaders):
            features = _features(model, pixels.to(device))
            entries[image] = Entry(share, start, tuple(features.shape))  # type: ignore[arg-type]
            start += stream.write(features.cpu().contiguous().view(torch.int16).numpy().tobytes())
    write_json(_index_path(folder, share, shares), ShareIndex(entries))


def _decoded(dataset: Any, images: list[str], loaders: int) -> Iterator[tuple[str, Tensor]]:
    loader = DataLoader(_Pixels(dataset, images), batch_size=None, num_workers=loaders)
    yield from zip(images, loader, strict=True)


class _Pixels(Dataset[Tensor]):
    def __init__(self, dataset: Any, images: list[str]) -> None:
        self._dataset = dataset
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        out: Tensor = self._dataset.pixels(self._images[index])
        return out


@torch.no_grad()
def _features(model: Any, pixels: Tensor) -> Tensor:
    """What the projector would be given, whatever the code of the model around it."""
    inner = model.model
    projector, inner.mlp1 = inner.mlp1, nn.Identity()
    try:
        features: Tensor = inner.extract_feature(pixels.to(inner.vision_model.dtype))
    finally:
        inner.mlp1 = projector
    return features.to(torch.bfloat16)


def _data_path(folder: Path, share: int, shares: int) -> Path:
    return folder / f"{share}-of-{shares}.bin"


def _index_path(folder: Path, share: int, shares: int) -> Path:
    return folder / f"{share}-of-{shares}.json"
