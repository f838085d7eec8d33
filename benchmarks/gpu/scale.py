"""How large a run on GPUs is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shared.errors import ConfigurationError


class Sizes(msgspec.Struct, frozen=True):
    """Pictures of one row: how many each side is given, and how many differ."""

    ours: int
    raw: int
    distinct: int
    warm_up: int
    """Before either side is timed."""


class GpuScale(msgspec.Struct, frozen=True):
    """Sizes of everything that is measured; the targets are meant for the defaults."""

    rows: dict[str, Sizes]
    chats: int = 40
    """Of each kind; more make the percentiles steadier."""
    busy_items: int = 12_288
    """Of the batch that keeps the GPU busy while chats are measured; it is cancelled after."""

    def with_sizes(self, settings: Sequence[str]) -> GpuScale:
        """Replace sizes given as ``ROW.FIELD=N``, ``chats=N`` or ``busy_items=N``.

        Raises: ConfigurationError naming the one that is wrong.
        """
        scale = self
        for setting in settings:
            key, _, text = setting.partition("=")
            row, _, field = key.rpartition(".")
            try:
                number = {field: int(text)}
                if not row:
                    scale = msgspec.structs.replace(scale, **number)
                    continue
                rows = {**scale.rows, row: msgspec.structs.replace(scale.rows[row], **number)}
                scale = msgspec.structs.replace(scale, rows=rows)
            except (KeyError, ValueError, TypeError):
                raise ConfigurationError(
                    f"--size {setting}: write ROW.FIELD=N with a row of {', '.join(self.rows)} "
                    f"and a field of {', '.join(Sizes.__struct_fields__)}, or chats=N"
                ) from None
        return scale


FULL = GpuScale(
    {
        "448": Sizes(ours=4096, raw=768, distinct=1024, warm_up=256),
        "448-base64": Sizes(ours=4096, raw=0, distinct=1024, warm_up=0),
        "1080p": Sizes(ours=512, raw=80, distinct=128, warm_up=32),
        "12mp": Sizes(ours=2048, raw=64, distinct=32, warm_up=16),
    }
)
QUICK = GpuScale(
    {
        "448": Sizes(ours=1024, raw=256, distinct=256, warm_up=64),
        "448-base64": Sizes(ours=1024, raw=0, distinct=256, warm_up=0),
        "1080p": Sizes(ours=128, raw=24, distinct=32, warm_up=8),
        "12mp": Sizes(ours=512, raw=24, distinct=8, warm_up=8),
    },
    chats=15,
    busy_items=6144,
)
"""About a third of the time; the figures are coarser."""
DRY = GpuScale(
    {
        "448": Sizes(ours=300, raw=0, distinct=16, warm_up=16),
        "448-base64": Sizes(ours=100, raw=0, distinct=16, warm_up=0),
        "1080p": Sizes(ours=24, raw=0, distinct=2, warm_up=4),
        "12mp": Sizes(ours=8, raw=0, distinct=1, warm_up=1),
    },
    chats=5,
    busy_items=3000,
)
"""For the dry run with the echo engine."""
