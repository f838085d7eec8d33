"""The network: its published names and sizes, its mathematics against LLaMA's, its cache."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.checkpoints import weight_files
from shared.errors import CheckpointInvalid
from workers.inference.internvl import synthesis
from workers.inference.internvl.backbone import (
    Backbone,
    BuiltInBackbone,
    PublishedBackbone,
    no_tiles,
)
from workers.inference.internvl.checkpoint import read_model
from workers.inference.internvl.config import LanguageConfig, ModelConfig, read_config, to_json
from workers.inference.internvl.export import export_with_code
from workers.inference.internvl.model import InternVL, pixel_shuffle
from workers.inference.internvl.preprocess import tiles_of
from workers.inference.internvl.synthesis import INTERNVL2_2B, TINY
from workers.inference.internvl.tokenizer import FastVocabulary
from workers.inference.internvl.vision_ops import provide_vision_ops
from workers.inference.tiny import CHECKPOINT, scenes

provide_vision_ops()
from transformers import (  # noqa: E402 - beside a CPU build of torch only after the line above
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> InternVL:
    """The trained tiny model."""
    return read_model(CHECKPOINT, TINY, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def with_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with modelling code of its own."""
    out = tmp_path_factory.mktemp("exported") / "tiny_with_code"
    export_with_code(CHECKPOINT, out)
    return out


@pytest.fixture(scope="module")
def published(with_code: Path) -> Any:
    """The same model, loaded by the code in its folder."""
    return AutoModel.from_pretrained(
        str(with_code), trust_remote_code=True, torch_dtype=torch.float32
    ).eval()


def test_the_published_2b_shapes_are_met() -> None:
    """517 tensors and 2,205,754,368 parameters, under the published names."""
    shapes = synthesis.shapes_of(INTERNVL2_2B)
    assert len(shapes) == 517
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_205_754_368
    assert shapes["language_model.model.layers.23.attention.wqkv.weight"] == (4096, 2048)
    assert shapes["language_model.model.tok_embeddings.weight"] == (92553, 2048)
    assert shapes["language_model.output.weight"] == (92553, 2048)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert shapes["vision_model.encoder.layers.0.attn.qkv.bias"] == (3072,)
    assert shapes["vision_model.encoder.layers.0.ls1"] == (1024,)
    assert shapes["mlp1.0.weight"] == (4096,)
    assert shapes["mlp1.3.weight"] == (2048, 2048)


def test_a_config_survives_writing_and_reading(tmp_path: Path) -> None:
    """What is written under the published keys is read back as it was."""
    for config in (TINY, INTERNVL2_2B):
        raw = to_json(config, {"bos": 1, "eos": 2, "pad": 2})
        assert raw["model_type"] == "internvl_chat"
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert read_config(tmp_path) == config
    assert INTERNVL2_2B.tokens_per_tile == 256


def _as_llama(model: InternVL, config: LanguageConfig) -> LlamaForCausalLM:
    """A LLaMA with the same weights, its queries, keys and values taken out of ``wqkv``."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
        )
    ).eval()
    source = model.language_model.state_dict()
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": source["model.tok_embeddings.weight"],
        "model.norm.weight": source["model.norm.weight"],
        "lm_head.weight": source["output.weight"],
    }
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    per_key = config.num_attention_heads // config.num_key_value_heads
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        for ours, theirs in names.items():
            weights[f"{layer}{theirs}.weight"] = source[f"{layer}{ours}.weight"]
        rows = source[f"{layer}attention.wqkv.weight"].split(config.head_size)
        groups = [rows[first : first + per_key + 2] for first in range(0, len(rows), per_key + 2)]
        weights[f"{layer}self_attn.q_proj.weight"] = torch.cat([r for g in groups for r in g[:-2]])
        weights[f"{layer}self_attn.k_proj.weight"] = torch.cat([g[-2] for g in groups])
        weights[f"{layer}self_attn.v_proj.weight"] = torch.cat([g[-1] for g in groups])
    llama.load_state_dict(weights)
    return llama


def test_the_language_model_agrees_with_llama(model: InternVL) -> None:
    """InternLM2 is LLaMA with queries, keys and values interleaved by group."""
    ids = torch.randint(0, TINY.language.vocab_size, (2, 33), generator=torch.manual_seed(1))
    with torch.inference_mode():
        ours = model.language_model(model.language_model.embed(ids))
        theirs = _as_llama(model, TINY.language)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_pixel_shuffle_gathers_each_square_of_patches() -> None:
    """Output (i, j) holds the four patches of square (i, j): left pair above, row by row."""
    patches = torch.arange(16.0).view(1, 4, 4, 1)
    folded = pixel_shuffle(patches, 0.5)
    assert folded.shape == (1, 2, 2, 4)
    assert folded[0, 0, 0].tolist() == [0, 1, 4, 5]
    assert folded[0, 0, 1].tolist() == [2, 3, 6, 7]
    assert folded[0, 1, 0].tolist() == [8, 9, 12, 13]
    assert torch.equal(pixel_shuffle(patches, 0.5, "v1"), folded.transpose(1, 2))


def _prompts(sizes_px: list[int]) -> tuple[list[list[int]], list[Any]]:
    vocabulary = FastVocabulary.read(CHECKPOINT)
    context = vocabulary.control("<IMG_CONTEXT>")
    prompts, tiles = [], []
    for index, size_px in enumerate(sizes_px):
        cut = tiles_of(scenes.scene("held_out", index, size_px).image, TINY)
        tiles.append(cut if size_px != 100 else no_tiles(TINY))
        prompts.append(
            [
                1,
                *[context] * (len(tiles[-1]) * TINY.tokens_per_tile),
                *vocabulary.encode("Describe"),
            ]
        )
    return prompts, tiles


def _continued(backbone: Backbone, prompts: list[list[int]], tiles: list[Any]) -> list[Tensor]:
    """Logits of each prompt alone: one prefill, then tokens 40, 41 and 42."""
    seen = []
    for prompt, cut in zip(prompts, tiles, strict=True):
        seen.append(
            torch.cat([backbone.join([prompt], [cut]), *[backbone.step([t]) for t in (40, 41, 42)]])
        )
        backbone.leave(0)
    return seen


def _built_in(model: InternVL) -> BuiltInBackbone:
    context = FastVocabulary.read(CHECKPOINT).control("<IMG_CONTEXT>")
    return BuiltInBackbone(model, context, dtype=torch.float32, device=CPU)


def test_rows_that_come_and_go_compute_what_each_would_alone(model: InternVL) -> None:
    """Prompts of several lengths, with and without images, joining and leaving between steps."""
    prompts, tiles = _prompts([64, 200, 100, 120])
    alone = _continued(_built_in(model), prompts, tiles)
    backbone = _built_in(model)
    first = backbone.join(prompts[:2], tiles[:2])
    torch.testing.assert_close(first, torch.stack([alone[0][0], alone[1][0]]), rtol=1e-4, atol=1e-3)
    backbone.step([40, 40])
    last = backbone.join(prompts[2:], tiles[2:])
    torch.testing.assert_close(last, torch.stack([alone[2][0], alone[3][0]]), rtol=1e-4, atol=1e-3)
    backbone.leave(0)  # the last row, of prompt 3, takes its place
    logits = backbone.step([40, 41, 40])
    expected = torch.stack([alone[3][1], alone[1][2], alone[2][1]])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def test_a_prefill_that_fails_adds_no_row(model: InternVL) -> None:
    """A prompt with more image tokens than tiles fails; the row beside it is unharmed."""
    prompts, tiles = _prompts([64, 64])
    alone = _continued(_built_in(model), prompts[:1], tiles[:1])[0]
    backbone = _built_in(model)
    backbone.join(prompts[:1], tiles[:1])
    with pytest.raises((RuntimeError, IndexError)):
        backbone.join([[*prompts[1], *prompts[1]]], tiles[1:])
    torch.testing.assert_close(backbone.step([40])[0], alone[1], rtol=1e-4, atol=1e-3)


def test_exported_code_computes_what_the_built_in_network_does(
    model: InternVL, published: Any
) -> None:
    """Through its published interface, past keys and values included."""
    prompts, tiles = _prompts([64, 200, 100])
    context = FastVocabulary.read(CHECKPOINT).control("<IMG_CONTEXT>")
    theirs = PublishedBackbone(published, context, dtype=torch.float32, device=CPU)
    for ours, other in zip(
        _continued(_built_in(model), prompts, tiles),
        _continued(theirs, prompts, tiles),
        strict=True,
    ):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-3)


def test_exported_code_ignores_padding_on_either_side(published: Any) -> None:
    """The real tokens' logits are the same with padding left, right or none."""
    language = published.language_model
    ids = torch.randint(3, 400, (1, 9), generator=torch.manual_seed(2))
    pad = torch.zeros(1, 4, dtype=torch.long)
    real, none = torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        alone = language(input_ids=ids).logits
        right = language(
            input_ids=torch.cat([ids, pad], 1), attention_mask=torch.cat([real, none], 1)
        ).logits[:, :9]
        left = language(
            input_ids=torch.cat([pad, ids], 1),
            attention_mask=torch.cat([none, real], 1),
            position_ids=torch.cat([pad, torch.arange(9)[None]], 1),
        ).logits[:, 4:]
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-3)


def test_exported_code_trains_with_gradient_checkpointing(published: Any) -> None:
    """Loss and gradients are those without it, and the labels' loss is the usual one."""
    vocabulary = AutoTokenizer.from_pretrained(published.name_or_path, trust_remote_code=True)
    published.img_context_token_id = vocabulary.convert_tokens_to_ids("<IMG_CONTEXT>")
    prompts, _ = _prompts([64])
    ids = torch.tensor(prompts)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.manual_seed(3))
    weight = published.language_model.model.layers[0].attention.wqkv.weight

    def gradient() -> tuple[float, Tensor]:
        published.zero_grad()
        out = published(pixels, ids, torch.ones_like(ids), labels=ids)
        out.loss.backward()
        return out.loss.item(), weight.grad.clone()

    published.train()
    plain_loss, plain = gradient()
    published.language_model.gradient_checkpointing_enable()
    loss, checkpointed = gradient()
    published.language_model.gradient_checkpointing_disable()
    published.eval()
    assert published.language_model.model.gradient_checkpointing is False
    assert loss == pytest.approx(plain_loss)
    assert plain.abs().sum() > 0
    torch.testing.assert_close(checkpointed, plain)


def test_exported_code_can_be_saved_and_loaded_again(published: Any, tmp_path: Path) -> None:
    """As a fine-tune's conversion does: the config keeps its parts, the weights their names."""
    published.save_pretrained(tmp_path)
    assert read_config(tmp_path) == TINY
    again = read_model(tmp_path, TINY, dtype=torch.float32, device=CPU)
    name = "language_model.model.layers.1.attention.wqkv.weight"
    assert torch.equal(again.state_dict()[name], published.state_dict()[name])


def test_random_checkpoints_load_everywhere_and_are_seeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several shards with an index, the same bytes for the same seed, other bytes for another."""
    monkeypatch.setattr(synthesis, "_SHARD_BYTES", 300_000)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        synthesis.write_random(tmp_path / name, TINY, seed)
    files = weight_files(tmp_path / "one")
    assert len(files) > 1
    model = read_model(tmp_path / "one", TINY, dtype=torch.float32, device=CPU)
    weight = model.state_dict()["language_model.output.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(model.state_dict()["mlp1.0.weight"], torch.ones(256))
    for file in files:
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()
    assert files[0].read_bytes() != (tmp_path / "other" / files[0].name).read_bytes()


def test_a_random_checkpoints_tokenizer_fills_the_vocabulary(tmp_path: Path) -> None:
    """As many ids as the embedding has rows, the image tokens among them, for transformers too."""
    synthesis.main([str(tmp_path / "tiny"), "--size", "tiny", "--with-code"])
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "tiny"))
    assert len(tokenizer) == TINY.language.vocab_size
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == TINY.language.vocab_size - 1
    assert tokenizer("hi").input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer("naïve 图 text").input_ids[1:]) == "naïve 图 text"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """A tensor of the wrong shape is named."""
    synthesis.write_random(tmp_path, TINY)
    other: ModelConfig = replace(TINY, language=replace(TINY.language, intermediate_size=128))
    with pytest.raises(CheckpointInvalid, match=r"feed_forward\.w"):
        read_model(tmp_path, other, dtype=torch.float32, device=CPU)
