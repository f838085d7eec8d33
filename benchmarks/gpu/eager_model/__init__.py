"""A checkpoint whose code attends eagerly, as published InternVL2 code does without flash-attn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CODE = Path(__file__).parent / "modeling_eager.py"


def add_eager_code(folder: Path) -> None:
    """Make a checkpoint that carries this project's code use the eager classes."""
    shutil.copyfile(CODE, folder / CODE.name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("AutoModel", "AutoModelForCausalLM"):
        config["auto_map"][name] = f"{CODE.stem}.EagerInternVLChatModel"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
