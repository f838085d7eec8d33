"""Makes a model folder carry the code that published InternVL2 folders carry.

Stock training is slow because of that code, so stock has to be measured with it. The modelling files
of both towers are taken from the installed xtuner, which ships them; the two small files around
them are in ``published_code``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

from workers.inference.internvl.tokenizer import write_json

_TOWERS = {
    "internlm2": ("configuration_internlm2.py", "modeling_internlm2.py"),
    "internvl2": ("configuration_intern_vit.py", "modeling_intern_vit.py"),
}
_AROUND = ("configuration_internvl_chat.py", "modeling_internvl_chat.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}


def xtuner_folder() -> Path:
    """Where xtuner is installed, without importing it, which takes seconds.

    Raises: AssertionError if it is not.
    """
    found = importlib.util.find_spec("xtuner")
    origin = None if found is None else found.origin
    assert origin is not None, "xtuner is not installed in this environment"
    return Path(origin).parent


def add_published_code(folder: Path) -> None:
    """Put the code into a checkpoint's folder and name it in ``config.json``.

    Raises: AssertionError if xtuner is not installed.
    """
    modelings = xtuner_folder() / "_lite" / "modelings"
    for tower, names in _TOWERS.items():
        for name in names:
            shutil.copyfile(modelings / tower / name, folder / name)
    for name in _AROUND:
        shutil.copyfile(Path(__file__).parent / "published_code" / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**config, "auto_map": _AUTO_MAP})
