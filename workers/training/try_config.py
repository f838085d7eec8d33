"""``python -m workers.training.try_config CONFIG``: whether a configuration can be imported at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.training import surroundings


def main(path: Path) -> None:
    """Import it as the trainer will; whatever it raises is told and ends this with status 1."""
    surroundings.prepare_environment(path.parent / "cache", modules=path.parent / "modules")
    surroundings.prepare_imports()
    from mmengine.config import Config

    config = Config.fromfile(str(path))
    missing = [name for name in ("model", "train_dataloader", "train_cfg") if name not in config]
    if missing:
        raise SystemExit(f"it sets no {' and no '.join(missing)}, so it is none of xtuner's")
    _visit({name: config[name] for name in config})


def _visit(value: Any) -> None:
    """Look at everything: what a configuration imports is imported only when it is looked at."""
    if isinstance(value, Mapping):
        for item in value.values():
            _visit(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _visit(item)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
