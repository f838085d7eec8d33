"""Small checkpoint folders that are whole, and the bytes of safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"]}
TUNABLE = {**CONFIG, "llm_config": {"architectures": ["InternLM2ForCausalLM"]}}
TENSORS = {"a": ("F32", [2, 3], 24), "b": ("BF16", [5], 10), "none": ("U8", [0, 4], 0)}


def safetensors(tensors: Mapping[str, tuple[str, list[int], int]] = TENSORS) -> bytes:
    """A file of tensors, each ``(dtype, shape, bytes)``, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    return with_header(json.dumps(header).encode(), bytes(i % 251 for i in range(start)))


def with_header(header: bytes, body: bytes = b"") -> bytes:
    """A file with this header."""
    return struct.pack("<Q", len(header)) + header + body


def write_checkpoint(folder: Path, config: Mapping[str, Any] = CONFIG) -> Path:
    """A folder with one file of weights that can be linked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def write_sharded(folder: Path) -> Path:
    """The same in two shards with an index."""
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [{"a": TENSORS["a"]}, {"b": TENSORS["b"], "none": TENSORS["none"]}]
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(safetensors(part))
    places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
