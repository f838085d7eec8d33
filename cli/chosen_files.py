"""Which files of a repository make its checkpoint; the rest is not fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from cli.checkpoint_source import SourceFile
from shared.checkpoints import INDEX, PICKLES, SINGLE
from shared.errors import CheckpointInvalid

_DESCRIPTION = re.compile(
    r"[^/]+\.(json|txt|model|tiktoken|spm)|(LICEN[CS]E|NOTICE)[^/]*|(.+/)?[^/]+\.(py|jinja)"
)
"""Config, tokenizer, processor, terms; and code, which packages may hold in folders of their own."""


def is_wanted(name: str) -> bool:
    """Whether a file may be part of a checkpoint at all, pickles included."""
    return (
        is_description(name)
        or bool(re.fullmatch(r"[^/]+\.safetensors", name))
        or (PICKLES.fullmatch(name) is not None)
    )


def is_description(name: str) -> bool:
    """Whether a file describes the model rather than holding its weights."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and _DESCRIPTION.fullmatch(name) is not None


def descriptions(files: Mapping[str, SourceFile]) -> list[SourceFile]:
    """Everything but the weights."""
    return [file for name, file in sorted(files.items()) if is_description(name)]


def weights(
    files: Mapping[str, SourceFile], indexed: Iterable[str] | None, *, pickles: bool
) -> list[SourceFile]:
    """The files with the weights; ``indexed`` are those that the index names, if there is one.

    Raises: CheckpointInvalid if there are none, or pickles only and ``pickles`` does not allow them.
    """
    if indexed is not None:
        names = sorted(set(indexed))
        missing = [name for name in names if name not in files]
        if missing:
            raise CheckpointInvalid(f"{INDEX} names {missing[0]}, which is not there")
        return [files[name] for name in names]
    if SINGLE in files:
        return [files[SINGLE]]
    found = sorted(name for name in files if PICKLES.fullmatch(name))
    if not found:
        raise CheckpointInvalid(f"there is no {SINGLE} and no {INDEX}: it is no checkpoint")
    if not pickles:
        raise CheckpointInvalid(
            f"its weights are pickles only ({found[0]}), and reading a pickle can run code that is "
            "inside it, as the user that runs vlmq; look for a revision with safetensors, or say "
            "--trust-remote-code if you trust who made it"
        )
    return [files[name] for name in found]
