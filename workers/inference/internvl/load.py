"""From a checkpoint folder to what can be asked, with a say on whose code runs.

A checkpoint with code of its own is arbitrary Python. Without consent nothing of it is imported:
the load is refused, even where the built-in network could read the weights, because the folder's
code may mean the weights differently.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.checkpoints import own_code, require_whole, weights_bytes
from shared.errors import CheckpointInvalid, EngineSetupFailed, RemoteCodeRefused

from . import template
from .backbone import Backbone, BuiltInBackbone, PublishedBackbone
from .checkpoint import read_model
from .config import ConfigInvalid, ModelConfig, read_config
from .tokenizer import FastVocabulary, TokenizerInvalid, Vocabulary
from .vision_ops import provide_vision_ops

log = logging.getLogger(__name__)

_SMALL_BYTES = 2 * 1024**3  # up to here a CPU computes in float32, which is faster and exacter


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked. ``ends`` are the tokens that end an answer."""

    config: ModelConfig
    vocabulary: Vocabulary
    backbone: Backbone
    ends: frozenset[int]


def load(
    folder: Path, *, trust_remote_code: bool, device: torch.device, dtype: torch.dtype | None
) -> Loaded:
    """Load a checkpoint; ``dtype`` None chooses by device and size.

    Raises: RemoteCodeRefused, or EngineSetupFailed with what to do.
    """
    if not folder.is_dir():
        raise EngineSetupFailed(
            f"there is no model folder {folder}; check the path it was linked by"
        )
    code = own_code(folder)
    if code and not trust_remote_code:
        raise RemoteCodeRefused(
            f"{folder} carries its own code ({code}); read it, and if you trust it link the model "
            "with --trust-remote-code"
        )
    require_whole(folder, pickles=trust_remote_code)
    try:
        config = read_config(folder)
        chosen = dtype or _dtype_for(folder, device)
        if code:
            return _load_published(folder, config, device, chosen)
        return _load_built_in(folder, config, device, chosen)
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else error
        raise EngineSetupFailed(
            f"{folder} has no {name}; it is not a complete checkpoint"
        ) from None
    except ConfigInvalid as error:
        raise EngineSetupFailed(
            f"{folder}: {error}; link an InternVL2 model with InternLM2, or have this one served by "
            "another engine, such as lmdeploy"
        ) from None
    except TokenizerInvalid as error:
        raise EngineSetupFailed(
            f"{folder}: {error}; copy the tokenizer files of the model it was made from"
        ) from None
    except CheckpointInvalid as error:
        raise EngineSetupFailed(f"{folder}: {error}; copy the checkpoint anew") from None
    except (OSError, UnicodeDecodeError) as error:
        raise EngineSetupFailed(f"{folder} cannot be read: {error}") from None


def _dtype_for(folder: Path, device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        return torch.bfloat16
    return torch.float32 if weights_bytes(folder) <= _SMALL_BYTES else torch.bfloat16


def _load_built_in(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Loaded:
    vocabulary = FastVocabulary.read(folder)
    model = read_model(folder, config, dtype=dtype, device=device)
    image_token = vocabulary.control(template.IMAGE_CONTEXT)
    backbone = BuiltInBackbone(model, image_token, dtype=dtype, device=device)
    return Loaded(config, vocabulary, backbone, _ends(folder, vocabulary))


class PublishedVocabulary:
    """A tokenizer whose code came with its checkpoint."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        ).input_ids
        return ids

    def control(self, token: str) -> int:
        """The id of a control token. Raises: TokenizerInvalid when there is none."""
        number = self._tokenizer.convert_tokens_to_ids(token)
        if number is None or (
            number == self._tokenizer.unk_token_id and token != self._tokenizer.unk_token
        ):
            raise TokenizerInvalid(f"the tokenizer has no token {token}")
        return int(number)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _load_published(
    folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Loaded:
    """Load by the checkpoint's own code; whatever that raises is a failed setup."""
    provide_vision_ops()
    from transformers import AutoModel, AutoTokenizer

    log.warning("running the code that came with %s", folder)
    given = {"trust_remote_code": True, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **given)
        model, report = AutoModel.from_pretrained(
            str(folder), torch_dtype=dtype, output_loading_info=True, **given
        )
    except Exception as error:
        raise EngineSetupFailed(
            f"the code that came with {folder} failed: {type(error).__name__}: {error}"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointInvalid(f"{len(missing)} tensors are missing, first {missing[0]}")
    model = model.to(device).eval().requires_grad_(False)
    vocabulary = PublishedVocabulary(tokenizer)
    image_token = vocabulary.control(template.IMAGE_CONTEXT)
    backbone = PublishedBackbone(model, image_token, dtype=dtype, device=device)
    return Loaded(config, vocabulary, backbone, _ends(folder, vocabulary))


def _ends(folder: Path, vocabulary: Vocabulary) -> frozenset[int]:
    ends = {vocabulary.control(template.TURN_END), vocabulary.control(template.END)}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointInvalid(f"generation_config.json cannot be read: {error}") from None
        ends |= {named} if isinstance(named, int) else set(named or ())
    return frozenset(ends)
