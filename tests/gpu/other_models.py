"""Writes small checkpoints with random weights of vision-language models that are not InternVL.

By transformers' own classes, so that their files are what a hub would hold. Their answers are
gibberish; that the image matters to them shows all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
_TEXT = [
    "user assistant system what is in this image a red circle left of a blue square word",
    "You are a helpful assistant. USER: ASSISTANT: describe the picture beside number",
]
_QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERNVL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")


def write_qwen2_vl(out: Path) -> None:
    """Write a Qwen2-VL: pictures of any size become as many patches as they have."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    tokenizer = _fast(_QWEN_TOKENS, end="<|im_end|>", pad="<|endoftext|>", chat=_QWEN_TEMPLATE)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _QWEN_TOKENS}
    text = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    }
    vision = {"depth": 2, "embed_dim": 256, "num_heads": 4, "hidden_size": 512, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=text,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    _save(Qwen2VLForConditionalGeneration(config), out)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        **_video(Qwen2VLProcessor, "Qwen2VLVideoProcessor"),
    )
    processor.save_pretrained(out)


def write_internvl3(out: Path) -> None:
    """Write an InternVL3 in the form that transformers has built in."""
    import torch
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        Qwen2Config,
    )

    tokens = (*_INTERNVL_TOKENS, *_QWEN_TOKENS[:3])
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokenizer = _fast(
        tokens,
        end="<|im_end|>",
        pad="<|endoftext|>",
        chat=_QWEN_TEMPLATE,
        extra_special_tokens=dict(zip(roles, _INTERNVL_TOKENS, strict=True)),
    )
    text = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    _save(InternVLForConditionalGeneration(config), out)
    pictures = GotOcr2ImageProcessor(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    InternVLProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        image_seq_length=256,
        chat_template=_QWEN_TEMPLATE,
        **_video(InternVLProcessor, "InternVLVideoProcessor"),
    ).save_pretrained(out)


WRITERS: dict[str, Callable[[Path], None]] = {
    "qwen2-vl": write_qwen2_vl,
    "internvl3": write_internvl3,
}
"""By the model's usual name."""


def _save(model: Any, out: Path) -> None:
    """Save it with weights under which attention counts as much as the last word does.

    By transformers' own small ones an answer would hardly depend on the picture.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.to(torch.bfloat16).save_pretrained(out)


def _video(processor: Any, name: str) -> dict[str, Any]:
    """Newer processors want one for videos, too."""
    import transformers

    if "video_processor" not in getattr(processor, "attributes", ["video_processor"]):
        return {}
    return {"video_processor": getattr(transformers, name)()}


def _fast(
    controls: tuple[str, ...],
    *,
    end: str,
    pad: str,
    chat: str,
    **more: Any,
) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in controls])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=pad,
        chat_template=chat,
        **more,
    )
