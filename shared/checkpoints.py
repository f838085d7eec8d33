"""Whether a checkpoint folder is whole, seen from its files alone: no tensor library, no weights read.

A safetensors file says in its first bytes what the rest of it must be: the length of a JSON header
(8 bytes, little-endian), the header with each tensor's type, shape and place, then exactly those
bytes. So a file that a copy or a download cut short is told from a whole one without reading it.
Flipped bits inside the weights are not; a download is compared with its hub's hashes for that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CheckpointInvalid, EngineSetupFailed

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLES = re.compile(r"pytorch_model[^/]*\.bin|[^/]+\.pth?")
"""Names of weights that only a pickle reader can read; reading a pickle may run code inside it."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_LENGTH_BYTES = 8
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[\w.+@=, -]{1,200}", re.ASCII)
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_TENSOR_FIELDS = {"dtype", "shape", "data_offsets"}
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file: ``[start, end)`` in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_checkpoint(folder: Path, *, pickles: bool = False) -> None:
    """Make sure that ``folder`` holds a whole checkpoint: config, tokenizer and every weight.

    ``pickles`` says that weights may be pickles where there are no safetensors, which whoever runs
    code from the folder anyway may allow.

    Raises: CheckpointInvalid naming the file and what is wrong with it.
    """
    check_description(folder)
    for file in weight_files(folder, pickles=pickles):
        if file.suffix == ".safetensors":
            read_header(file)
    _check_index(folder)


def check_description(folder: Path) -> None:
    """The part of :func:`check_checkpoint` that needs no weights. Raises: CheckpointInvalid."""
    _check_config(folder / CONFIG)
    if not _has_tokenizer(folder):
        raise CheckpointInvalid(
            f"{folder} holds no tokenizer ({', '.join(_TOKENIZERS[:3])} or the like); copy the "
            "tokenizer files of the model"
        )


def require_whole(folder: Path, *, pickles: bool) -> None:
    """:func:`check_checkpoint` for engines, before they load anything.

    Raises: EngineSetupFailed, since starting again would not help.
    """
    try:
        check_checkpoint(folder, pickles=pickles)
    except CheckpointInvalid as error:
        raise EngineSetupFailed(error.message) from None


def weight_files(folder: Path, *, pickles: bool = False) -> list[Path]:
    """The files with the weights: those that the index names, or the single one.

    Raises: CheckpointInvalid when there are none, or one is missing or empty.
    """
    names = _weight_names(folder, pickles=pickles)
    for name in names:
        path = folder / name
        if not path.is_file():
            reason = f", which {INDEX} names" if len(names) > 1 else ""
            raise CheckpointInvalid(f"{folder} has no {name}{reason}; copy it there")
        if _size(path) == 0:
            raise CheckpointInvalid(f"{path} is empty; copy it anew")
    return [folder / name for name in names]


def weights_bytes(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint as they are stored, headers left out.

    A lower bound for the memory that holds them in their own type. Pickles count whole.
    Raises: CheckpointInvalid.
    """
    return sum(_tensor_bytes(file) for file in weight_files(folder, pickles=True))


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name, from its header, which must fit the file.

    Raises: CheckpointInvalid naming the file and what is wrong with it.
    """
    size = _size(path)
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                raise _broken(path, f"it has only {size} bytes")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"its header would have {length} bytes")
            if _LENGTH_BYTES + length > size:
                raise _broken(path, f"its header of {length} bytes is longer than the file")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error.strerror or error}") from None
    tensors = _parse_header(path, text)
    _check_places(path, tensors, size - _LENGTH_BYTES - length)
    return tensors


def own_code(folder: Path) -> str | None:
    """Where a checkpoint's own code shows: a Python file, or a JSON file with ``auto_map``.

    Nothing is imported. A JSON file that cannot be read shows no code here.
    """
    for path in sorted(folder.rglob("*.py")):
        return str(path.relative_to(folder))
    for path in sorted(folder.glob("*.json")):
        if path.name in ("tokenizer.json", INDEX):
            continue
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if _has_auto_map(raw):
            return f"auto_map in {path.name}"
    return None


def indexed_names(index: Path) -> dict[str, str]:
    """Which file holds which tensor, as an index says. Raises: CheckpointInvalid."""
    raw = read_object(index)
    names = raw.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointInvalid(f"{index} has no weight_map; copy it anew")
    for name in names.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise CheckpointInvalid(
                f"{index} names a file outside the folder, or no file: {_shown(name)}"
            )
    return names


# --- weights -------------------------------------------------------------------------------------


def _weight_names(folder: Path, *, pickles: bool) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(indexed_names(folder / INDEX).values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shards = [name for name in present if _SHARD.fullmatch(name)]
    if shards:
        raise CheckpointInvalid(f"{folder} has {shards[0]} but no {INDEX}; copy that too")
    found = [name for name in present if PICKLES.fullmatch(name)]
    if not found:
        raise CheckpointInvalid(f"{folder} has no {SINGLE} and no {INDEX}; it holds no weights")
    if not pickles:
        raise CheckpointInvalid(
            f"{folder} has its weights as pickles only ({found[0]}), and reading a pickle can run "
            "code that is inside it; convert them to safetensors, or link the model with "
            "--trust-remote-code if you trust who made them"
        )
    if (folder / PICKLE_INDEX).is_file():
        return sorted(set(indexed_names(folder / PICKLE_INDEX).values()))
    return found


def _check_index(folder: Path) -> None:
    """Each tensor that the index places in a file is really there."""
    index = folder / INDEX
    if not index.is_file():
        return
    headers: dict[str, Mapping[str, TensorPlace]] = {}
    for tensor, name in indexed_names(index).items():
        if name not in headers:
            headers[name] = read_header(folder / name)
        if tensor not in headers[name]:
            raise CheckpointInvalid(
                f"{folder / name} lacks the tensor {_shown(tensor)}, which {INDEX} places there; "
                "the two are of different checkpoints"
            )


def _tensor_bytes(file: Path) -> int:
    size = _size(file)
    if file.suffix != ".safetensors":
        return size
    return sum(place.end - place.start for place in read_header(file).values())


def _parse_header(path: Path, text: bytes) -> dict[str, TensorPlace]:
    if not text.startswith(b"{"):
        raise _broken(path, "its header is not JSON")
    raw = _decode(path, text, "its header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) and _is_text(name) and _is_text(value)
        for name, value in metadata.items()
    ):
        raise _broken(path, "the metadata in its header are not strings")
    return {name: _tensor_place(path, name, value) for name, value in raw.items()}


def _tensor_place(path: Path, name: str, value: Any) -> TensorPlace:
    if not _is_text(name) or not isinstance(value, dict) or value.keys() != _TENSOR_FIELDS:
        raise _broken(path, f"its header does not describe the tensor {_shown(name)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(path, f"the tensor {_shown(name)} has the unknown type {_shown(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"the tensor {_shown(name)} has no proper shape and place")
    start, end = offsets
    if math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        raise _broken(path, f"the tensor {_shown(name)} does not fill its place in the file")
    return TensorPlace(dtype, tuple(shape), start, end)


def _check_places(path: Path, tensors: Mapping[str, TensorPlace], available: int) -> None:
    """The tensors follow one another without gap or overlap and end where the file ends."""
    reached = 0
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != reached:
            fault = "overlaps another" if place.start < reached else "follows a gap"
            raise _broken(path, f"the tensor {_shown(name)} {fault}")
        reached = place.end
    if reached != available:
        fault = "cut short" if reached > available else "too long"
        raise _broken(path, f"it is {fault}: {available} bytes of weights instead of {reached}")


def _are_sizes(value: Any) -> bool:
    """A list of whole numbers a machine could count to; booleans are none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


# --- the other files -----------------------------------------------------------------------------


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise CheckpointInvalid(f"{path.parent} holds no {CONFIG}; is it a checkpoint?")
    config = read_object(path)
    kinds = config.get("architectures")
    if not isinstance(kinds, list):
        kinds = []
    if not any(isinstance(kind, str) and kind for kind in [config.get("model_type"), *kinds]):
        raise CheckpointInvalid(
            f"{path} names neither a model_type nor architectures; it is no model's config"
        )


def _has_tokenizer(folder: Path) -> bool:
    named = any((folder / name).is_file() for name in _TOKENIZERS)
    return named or any(folder.glob("*.tiktoken"))


def _has_auto_map(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("auto_map")) or any(_has_auto_map(part) for part in value.values())
    return isinstance(value, list) and any(_has_auto_map(part) for part in value)


def read_object(path: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises: CheckpointInvalid naming the file."""
    try:
        return _decode(path, path.read_bytes(), "it")
    except OSError as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error.strerror or error}") from None


def _decode(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except _NamedTwice as error:
        raise _broken(path, f"{what} names {_shown(error.name)} twice") from None
    except (ValueError, RecursionError):
        raise _broken(path, f"{what} is not JSON") from None
    if not isinstance(value, dict):
        raise _broken(path, f"{what} is not a JSON object")
    return value


class _NamedTwice(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _NamedTwice(name)
        found[name] = value
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error.strerror or error}") from None


def _broken(path: Path, reason: str) -> CheckpointInvalid:
    return CheckpointInvalid(f"{path} is damaged or cut short: {reason}; copy it anew")


def _is_text(value: str) -> bool:
    """Whether a string could be written down; JSON escapes may make halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: Any) -> str:
    """A name from a file, safe to print."""
    text = ascii(name)
    return text if len(text) <= 100 else f"{text[:97]}..."
