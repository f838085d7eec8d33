"""Tokenizers: reading a checkpoint's ``tokenizer.json``, and making one for checkpoints of ours.

A checkpoint whose tokenizer is code of its own needs consent and is read by the engine instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from . import template

# InternLM2's order: its first ids are these three.
FIRST_CONTROLS = (template.UNKNOWN, template.BEGIN, template.END)
LAST_CONTROLS = (
    template.TURN_START,
    template.TURN_END,
    template.IMAGE_START,
    template.IMAGE_END,
    template.IMAGE_CONTEXT,
)
# Spelled the way tokenizer_config.json wants it, for programs that read checkpoints of ours.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TokenizerInvalid(ValueError):
    """The tokenizer's files cannot be used."""


class Vocabulary(template.Vocabulary, Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        ...


class FastVocabulary:
    """A vocabulary read from ``tokenizer.json``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A user's text that spells a control token must not become one.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def read(cls, folder: Path) -> FastVocabulary:
        """Read ``folder/tokenizer.json``. Raises: TokenizerInvalid."""
        vocabulary = cls(_read(folder))
        for token in (template.BEGIN, *LAST_CONTROLS):
            vocabulary.control(token)
        return vocabulary

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def control(self, token: str) -> int:
        """The id of a control token. Raises: TokenizerInvalid when there is none."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise TokenizerInvalid(f"the tokenizer has no token {token}")
        return int(number)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def token_counter(folder: Path, controls: Iterable[str]) -> Callable[[str], int]:
    """Counts the tokens of texts, each control token spelled in them one; none is added.

    Raises: TokenizerInvalid, also if ``folder/tokenizer.json`` lacks one of ``controls``: then other
    files of the folder add them, and it alone would take them for text.
    """
    tokenizer = _read(folder)
    for name in controls:
        if tokenizer.token_to_id(name) is None:
            raise TokenizerInvalid(f"tokenizer.json has no token {name}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _read(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerInvalid("the folder has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise TokenizerInvalid(f"tokenizer.json cannot be read: {error}") from None


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Make a byte-level BPE tokenizer of exactly ``size`` ids that can spell any text.

    The three InternLM2 controls come first and the chat and image controls last, as published;
    what the texts leave over is filled with unused tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learned = size - len(LAST_CONTROLS)
    trainer = trainers.BpeTrainer(
        vocab_size=learned,
        show_progress=False,
        special_tokens=list(FIRST_CONTROLS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    known = tokenizer.get_vocab_size()
    if known > learned:
        raise ValueError(f"{size} ids are too few; {known + len(LAST_CONTROLS)} are needed")
    tokenizer = _filled(tokenizer, range(known, learned))
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in LAST_CONTROLS]
    )
    begin = tokenizer.token_to_id(template.BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{template.BEGIN} $A",
        pair=f"{template.BEGIN} $A $B",
        special_tokens=[(template.BEGIN, begin)],
    )
    return tokenizer


def _filled(tokenizer: Tokenizer, numbers: range) -> Tokenizer:
    """Give names to ids that nothing encodes to; as added tokens they would slow encoding down."""
    description = json.loads(tokenizer.to_str())
    description["model"]["vocab"].update({f"[UNUSED_{number}]": number for number in numbers})
    return Tokenizer.from_str(json.dumps(description))


def write_tokenizer(tokenizer: Tokenizer, out: Path, *, session_len: int = 8192) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "bos_token": template.BEGIN,
        "eos_token": template.END,
        "unk_token": template.UNKNOWN,
        "pad_token": template.END,
    }
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": list(LAST_CONTROLS),
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": session_len,
            **names,
        },
    )
    write_json(
        out / "special_tokens_map.json",
        {"additional_special_tokens": list(LAST_CONTROLS), **names},
    )


def write_json(path: Path, value: object) -> None:
    """Write a readable JSON file."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
