"""A tiny InternVL2 with a Phi-3 language model and random weights, laid out as InternVL2-4B is published.

Its code attends as the published one does where flash-attn is not installed. Its tokenizer is a
sentencepiece model, and has a ``tokenizer.json`` only if it is asked for.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

from workers.inference.internvl.checkpoint import write_weights
from workers.inference.internvl.config import to_json
from workers.inference.internvl.export import CODE_FILES
from workers.inference.internvl.synthesis import TINY
from workers.inference.internvl.vision_ops import provide_vision_ops

LAYERS, HIDDEN, HEADS, KEY_HEADS, INTERMEDIATE, VOCABULARY = 3, 64, 4, 2, 128, 416
SYSTEM_PROMPT = "You are an AI assistant whose name is Phi-3."
MARKS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
IMAGE_MARKS = ("<img>", "</img>", "<IMG_CONTEXT>")
_OWN_CODE = ("configuration_phi3_chat.py", "modeling_phi3.py", "modeling_phi3_chat.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_phi3_chat.Phi3ChatConfig",
    "AutoModel": "modeling_phi3_chat.Phi3ChatModel",
    "AutoModelForCausalLM": "modeling_phi3_chat.Phi3ChatModel",
}
_TEXTS = [SYSTEM_PROMPT, "What is it? A red circle left of a blue square."] * 20


def write_phi3(folder: Path, *, fast_tokenizer: bool = False) -> Path:
    """Write the checkpoint, code and all, into the new folder; returns it."""
    folder.mkdir(parents=True)
    for name in CODE_FILES:
        shutil.copyfile(Path("workers/inference/internvl") / name, folder / name)
    for name in _OWN_CODE:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    _write_tokenizer(folder, fast=fast_tokenizer)
    _write(folder / "config.json", _config())
    _write(folder / "generation_config.json", {"eos_token_id": _marks()["<|end|>"]})
    _write(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    _write_weights(folder)
    return folder


def _write_weights(folder: Path) -> None:
    provide_vision_ops()
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModel.from_config(config, trust_remote_code=True)
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    write_weights(folder, weights)


def _config() -> dict[str, Any]:
    described = to_json(TINY, {"bos": 1, "eos": 2, "pad": 2})
    language = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": _marks()["<|end|>"],
        "pad_token_id": _marks()["<|endoftext|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.1,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 8192,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    return {**described, "auto_map": _AUTO_MAP, "llm_config": language, "template": "phi3-chat"}


def _marks() -> dict[str, int]:
    """The added tokens and their ids, the last of the vocabulary."""
    names = (*MARKS, *IMAGE_MARKS)
    return {name: VOCABULARY - len(names) + index for index, name in enumerate(names)}


def _write_tokenizer(folder: Path, *, fast: bool) -> None:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY - len(_marks()),
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    _write(folder / "added_tokens.json", _marks())
    controls = {"<unk>": 0, "<s>": 1, "</s>": 2, **_marks()}
    names = {
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
    }
    _write(folder / "special_tokens_map.json", names)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {str(id_): _added(name) for name, id_ in controls.items()},
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 8192,
            "sp_model_kwargs": {},
            **names,
        },
    )
    if fast:
        from transformers import LlamaTokenizerFast

        tokenizer = LlamaTokenizerFast.from_pretrained(folder)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _added(name: str) -> dict[str, Any]:
    """Phi-3's marks swallow the white space that follows them."""
    return {
        "content": name,
        "lstrip": False,
        "normalized": False,
        "rstrip": name in MARKS[1:],
        "single_word": False,
        "special": True,
    }


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
