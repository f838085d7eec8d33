"""What makes training faster changes nothing but rounding, beside code that attends eagerly."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.eager_model import add_eager_code
from tests.phi3_model import write_phi3
from tests.training_runs import Site
from workers.inference.internvl.export import export_with_code
from workers.inference.internvl.vision_ops import provide_vision_ops
from workers.inference.tiny import CHECKPOINT
from workers.training.orders import Speed, TrainerExit

provide_vision_ops()
# Beside a CPU build of torch only now.
from transformers import AutoModel, Phi3Config, Phi3ForCausalLM  # noqa: E402

from workers.training.speed import set_checkpointing, use_sdpa  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOLERANCE = 0.005
"""Of the loss, in bfloat16, over a run whose rate is thirty times the usual one."""


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with code that attends as the published one."""
    folder = tmp_path_factory.mktemp("eager") / "eager_tiny"
    export_with_code(CHECKPOINT, folder)
    add_eager_code(folder)
    return folder


@pytest.fixture
def model(eager: Path) -> Any:
    """It in float32, inside of something that has it as ``model``, as xtuner has."""
    return loaded(eager)


@pytest.fixture
def phi3(tmp_path: Path) -> Any:
    """The same of one with Phi-3, whose code attends as the published one."""
    pytest.importorskip("sentencepiece", reason="needs vlmq[training]")
    return loaded(write_phi3(tmp_path / "phi3_tiny"))


def loaded(folder: Path) -> Any:
    outer = torch.nn.Module()
    outer.model = AutoModel.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32
    ).train()
    return outer


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a right-padded batch of two, and what it says about every weight."""
    dice = torch.Generator().manual_seed(3)
    ids = torch.randint(10, 400, (2, 24), generator=dice)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    inner = model.model
    embeds = inner.get_input_embeddings()(ids).clone()
    pixels = torch.randn(2, 3, 56, 56, generator=dice)
    embeds[:, 2:6] = inner.extract_feature(pixels)
    positions = torch.arange(24).expand(2, -1)
    logits = inner.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions
    ).logits
    labels = ids.masked_fill(mask == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_pytorchs_attention_gives_the_same_loss_and_gradients(model: Any) -> None:
    replaced = require_the_same_with_sdpa(model)
    assert replaced == 5, "three layers of the language model, two of the ViT"


def test_so_it_does_with_phi3(phi3: Any) -> None:
    replaced = require_the_same_with_sdpa(phi3)
    assert replaced == 3, "three layers of the language model; its ViT attends so already"
    set_checkpointing(phi3, on=True)
    assert phi3.model.language_model.is_gradient_checkpointing


def test_phi3_that_looks_back_only_so_far_is_left_as_it_is(phi3: Any) -> None:
    """The window is in the mask, which the replacement does not look at."""
    for layer in phi3.model.language_model.model.layers:
        layer.self_attn.config.sliding_window = 16
    assert use_sdpa(phi3) == 0


def test_transformers_own_phi3_is_left_as_it_is() -> None:
    """Its classes have the same names and another signature, and use PyTorch's attention."""
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    native = Phi3ForCausalLM(config)
    assert use_sdpa(native) == 0
    native(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()


def require_the_same_with_sdpa(model: Any) -> int:
    """In how many modules attention was replaced, without a change of the loss or a gradient."""
    set_checkpointing(model, on=False)
    loss, expected = gradients(model)
    replaced = use_sdpa(model)
    faster, found = gradients(model)
    torch.testing.assert_close(faster, loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    return replaced


def test_checkpointing_gives_the_same_gradients(model: Any) -> None:
    set_checkpointing(model, on=False)
    loss, expected = gradients(model)
    set_checkpointing(model, on=True)
    again, found = gradients(model)
    assert torch.equal(again, loss)
    assert all(torch.allclose(found[name], gradient) for name, gradient in expected.items())


def test_lora_on_the_vit_learns_though_its_pixels_need_no_gradient(model: Any) -> None:
    """Torch's older checkpointing, which the published ViT uses, would give none at all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_model.encoder.layers.0.attn" in name)
    model.model.language_model.enable_input_require_grads()
    encoder = model.model.vision_model.encoder
    encoder.gradient_checkpointing = True
    assert not any("vision_model" in name for name in gradients(model)[1])
    set_checkpointing(model, on=True)
    assert encoder.gradient_checkpointing
    assert any("vision_model" in name for name in gradients(model)[1])


def test_a_frozen_vit_is_never_computed_twice(model: Any) -> None:
    model.model.vision_model.requires_grad_(requires_grad=False)
    set_checkpointing(model, on=True)
    assert not model.model.vision_model.encoder.gradient_checkpointing
    assert model.model.language_model.is_gradient_checkpointing


def test_attention_that_is_asked_for_a_past_refuses(model: Any) -> None:
    use_sdpa(model)
    layer = model.model.language_model.model.layers[0].attention
    with pytest.raises(RuntimeError, match="use_cache"):
        layer(torch.zeros(1, 2, 64), position_ids=torch.arange(2)[None], use_cache=True)
    assert isinstance(layer.forward, types.MethodType)


def test_the_loss_curve_is_stocks_with_all_of_it(eager: Path, tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    cache = tmp_path / "features"
    recipe = {"lora_dropout": 0.0, "warmup_ratio": 0.2}
    curves = []
    for speed in (
        Speed(attention="stock", gradient_checkpointing=True),
        Speed(attention="sdpa", gradient_checkpointing=False),
        Speed(attention="sdpa", gradient_checkpointing=False, cached_features=str(cache)),
    ):
        run = site.run(recipe, base=str(eager), model_path=eager, speed=speed)
        finished = run.run()
        assert finished.status == TrainerExit.TRAINED, finished.output[-3000:]
        assert len(run.losses()) == 12
        curves.append(list(run.losses().values()))
    stock, faster, cached = curves
    assert faster == pytest.approx(stock, rel=TOLERANCE)
    assert cached == pytest.approx(faster, rel=TOLERANCE)
    # 48 pictures of one tile: 4 tokens of 256 channels, two bytes each.
    assert (cache / "0-of-1.bin").stat().st_size == 48 * 4 * 256 * 2
