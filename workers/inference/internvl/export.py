"""Adds modelling code to checkpoints of ours, for programs that load by ``trust_remote_code``.

xtuner and lmdeploy find the architecture through ``auto_map``; the files that it names are this
package's own network and thin wrappers around it, and need nothing but torch and transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .tokenizer import write_json

CODE_FILES = (
    "config.py",
    "model.py",
    "configuration_internvl_chat.py",
    "modeling_internvl_chat.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


def export_with_code(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint to the new folder ``out`` and add the code to the copy."""
    shutil.copytree(checkpoint, out)
    add_code(out)


def add_code(folder: Path) -> None:
    """Make a checkpoint carry its own code: the files, and ``auto_map`` in its config."""
    source = Path(__file__).parent
    for name in CODE_FILES:
        shutil.copyfile(source / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "auto_map": AUTO_MAP})
