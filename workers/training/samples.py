"""xtuner's data set for InternVL2, strict: what cannot be read ends the run.

xtuner puts another sample, drawn at random, in the place of one it cannot read, and tries 1,001 of
them before it gives up. Rows and images were checked before training, so one that cannot be read now
means that the data went away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from xtuner.dataset import InternVL_V1_5_Dataset

from shared.errors import ImageUnreadable
from workers.inference.orientation import upright


class StrictSamples(InternVL_V1_5_Dataset):  # type: ignore[misc]
    """Samples from LLaVA JSON; each as xtuner makes it, or an error that names its image."""

    def __getitem__(self, index: int) -> Any:
        sample = self.prepare_data(index)
        if sample is None:
            raise ImageUnreadable(
                f"{self._path(index)} can no longer be read, though it could when the data was checked"
            )
        return sample

    def get_image(self, path: str) -> Image.Image:
        """An image upright, as the serving engines see it."""
        with Image.open(path) as picture:
            return upright(picture).convert("RGB")

    def _path(self, index: int) -> Path:
        named = self.data[index]["image"]
        return Path(self.image_folder[index], named[0] if isinstance(named, list) else named)
