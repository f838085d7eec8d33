"""xtuner's data set for InternVL2, strict: what cannot be read ends the run.

xtuner puts another sample, drawn at random, in the place of one it cannot read, and tries 1,001 of
them before it gives up. Rows and images were checked before training, so one that cannot be read now
means that the data went away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.internvl_dataset import dynamic_preprocess

from shared.errors import ImageUnreadable
from workers.inference.orientation import upright
from workers.training.features import FeatureCache


class StrictSamples(InternVL_V1_5_Dataset):  # type: ignore[misc]
    """Samples from LLaVA JSON; each as xtuner makes it, or an error that names its image."""

    features: FeatureCache | None = None
    """Given in the place of pixels, where there is one."""

    def __getitem__(self, index: int) -> Any:
        sample = self.prepare_data(index) if self.features is None else self._from_cache(index)
        if sample is None:
            raise ImageUnreadable(
                f"{self._path(index)} can no longer be read, though it could when the data was checked"
            )
        return sample

    def get_image(self, path: str) -> Image.Image:
        """An image upright, as the serving engines see it."""
        with Image.open(path) as picture:
            return upright(picture).convert("RGB")

    def images(self) -> list[str | None]:
        """The path of each sample's image; None for text."""
        return [self._path(index) for index in range(len(self.data))]

    def pixels(self, path: str) -> Tensor:
        """An image's tiles, ``[tiles, 3, side, side]``, as in a sample."""
        tiles = dynamic_preprocess(
            self.get_image(path),
            self.min_dynamic_patch,
            self.max_dynamic_patch,
            self.image_size,
            self.use_thumbnail,
        )
        return torch.stack([self.transformer(tile) for tile in tiles])

    def _from_cache(self, index: int) -> dict[str, Any]:
        assert self.features is not None
        path = self._path(index)
        turns = self.data[index]["conversations"]
        if path is None:
            # As xtuner does: one tile of zeros that the model passes over.
            zeros = torch.zeros(1, 1, *self.features.tile_shape, dtype=torch.bfloat16)
            return {**self.get_inputid_labels(turns, None), "pixel_values": zeros}
        features = self.features.read(path)
        context = self.IMG_CONTEXT_TOKEN * (len(features) * self.patch_token)
        image = f"{self.IMG_START_TOKEN}{context}{self.IMG_END_TOKEN}"
        return {**self.get_inputid_labels(turns, image), "pixel_values": features}

    def _path(self, index: int) -> str | None:
        named: Any = self.data[index].get("image")
        if named is None:
            return None
        name = named[0] if isinstance(named, list) else named
        # As xtuner does: an absolute name wins.
        return str(Path(self.image_folder[index]) / name)
