"""A base whose language model is Phi-3, laid out as InternVL2-4B, trained and converted for real."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shared.checkpoints import check_checkpoint
from tests.phi3_model import write_phi3
from tests.training_runs import Run, Site, run_command, wait_until
from workers.training.base_facts import LLM_TARGETS
from workers.training.orders import Speed, TrainerExit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
pytest.importorskip("sentencepiece", reason="needs vlmq[training]")

STEPS = 12
LORA: dict[str, Any] = {"warmup_ratio": 0.2, "save_every": 2}
TARGETS = set(LLM_TARGETS["phi3"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """48 scenes and the base: 6 steps of 8 samples per epoch."""
    root = tmp_path_factory.mktemp("phi3")
    return Site(root / "site", base=write_phi3(root / "phi3_tiny"))


@pytest.fixture(scope="module")
def straight(site: Site) -> Run:
    """Twelve steps of two iterations each, with dropout, trained in one go."""
    run = trained_on(site, LORA)
    finished = run.run()
    assert finished.status == TrainerExit.TRAINED, finished.output[-3000:]
    return run


def trained_on(site: Site, recipe: dict[str, Any], **order: Any) -> Run:
    """A run that trains the base in its own folder, as it has code of its own."""
    return site.run(recipe, micro_batch_size=4, model_path=site.base, **order)


def test_the_loss_falls(straight: Run) -> None:
    losses = [metric.loss for metric in straight.metrics()]
    assert len(losses) == STEPS
    first, last = losses[0], losses[-1]
    assert first is not None
    assert last is not None
    assert last < first / 1.5


def test_lora_is_on_phi3s_layers_and_not_on_the_head(straight: Run) -> None:
    folder = straight.checkpoints()[-1].path
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    tuned = {name.split(".lora_")[0] for name in saved if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in tuned} == TARGETS
    assert len(tuned) == 3 * len(TARGETS), "three layers"
    assert not any("vision_model" in name for name in saved)


def test_a_checkpoint_takes_what_was_estimated(straight: Run) -> None:
    expected = straight.resolved.checkpoint_bytes
    assert straight.checkpoints()[0].size_bytes == pytest.approx(expected, rel=0.3)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(site: Site, straight: Run) -> None:
    first = trained_on(site, {**LORA, "save_every": 100})
    with first.started() as process:
        wait_until(lambda: len(first.metrics()) >= 2, "the second step")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == TrainerExit.STOPPED, first.log()[-3000:]
    (saved,) = first.checkpoints()
    assert saved.step < STEPS, "it was too late to stop"
    second = trained_on(site, LORA, resume=str(saved.path))
    assert second.run().status == TrainerExit.TRAINED
    assert first.losses() | second.losses() == straight.losses()


def test_every_way_to_compute_gives_stock_xtuners_losses(site: Site, tmp_path: Path) -> None:
    """Stock is compared in its first epoch: the second has its samples in another order."""
    recipe = {**LORA, "lora_dropout": 0.0}
    curves = []
    for speed in (
        Speed(attention="stock", gradient_checkpointing=True, labelled_logits=False),
        Speed(attention="sdpa", gradient_checkpointing=False),
        Speed(gradient_checkpointing=True, cached_features=str(tmp_path / "features")),
    ):
        run = trained_on(site, recipe, speed=speed)
        finished = run.run()
        assert finished.status == TrainerExit.TRAINED, finished.output[-3000:]
        replaced = 3 if speed.attention == "sdpa" else 0
        assert f"PyTorch's attention in {replaced} modules" in finished.output
        curves.append(list(run.losses().values()))
    plain, faster, cached = curves
    assert faster == pytest.approx(plain, rel=0.003)
    assert cached == pytest.approx(plain, rel=0.003)

    stock = trained_on(site, {**recipe, "n_epochs": 1})
    ours = trained_on(site, {**recipe, "n_epochs": 1})
    finished = stock.run_stock()
    assert finished.status == 0, finished.output[-3000:]
    assert ours.run().status == TrainerExit.TRAINED
    (stock.work_dir / "run.json").write_bytes((ours.work_dir / "run.json").read_bytes())
    assert len(stock.losses()) == 6
    assert list(stock.losses().values()) == pytest.approx(list(ours.losses().values()), rel=0.003)


# --- conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(site: Site, straight: Run) -> Path:
    """The straight run's last checkpoint as a model folder."""
    out = site.root / "model"
    finished = site.convert(straight, straight.checkpoints()[-1].path, out)
    assert finished.status == 0, finished.output[-3000:]
    return out


def test_a_converted_model_has_all_of_its_bases_files_and_tensors(
    site: Site, converted: Path
) -> None:
    assert {path.name for path in site.base.iterdir()} == {
        path.name for path in converted.iterdir()
    }
    for path in site.base.iterdir():
        if path.name != "model.safetensors":
            assert (converted / path.name).read_bytes() == path.read_bytes()
    check_checkpoint(converted)
    before, after = tensors(site.base), tensors(converted)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in before.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    in_language = {name.split(".")[-2] for name in changed if name.startswith("language_model")}
    assert in_language == TARGETS
    assert not any(name.startswith("vision_model") for name in changed)
    assert any(name.startswith("mlp1") for name in changed)


ASK = """
import json, sys, tempfile
from pathlib import Path
from workers.training import surroundings

config, checkpoint, base, converted = sys.argv[1:]
with tempfile.TemporaryDirectory() as cache:
    surroundings.prepare_environment(Path(cache))
    surroundings.single_process_group()
    surroundings.prepare_imports()
    surroundings.attend_without_flash()
    import torch
    from mmengine.config import Config
    from transformers import AutoModel
    from xtuner.registry import BUILDER
    from workers.training.convert import load_trained

    wrapper = BUILDER.build(Config.fromfile(config).model)
    load_trained(wrapper, Path(checkpoint))
    models = [wrapper.model]
    for folder in (base, converted):
        models.append(AutoModel.from_pretrained(folder, trust_remote_code=True))
    torch.manual_seed(0)
    ids, pixels = torch.randint(3, 400, (2, 40)), torch.randn(2, 3, 56, 56)

    @torch.no_grad()
    def logits(model):
        model = model.float().eval()
        embeds = model.language_model.get_input_embeddings()(ids).clone()
        embeds[:, 5:9] = model.extract_feature(pixels)
        everywhere = torch.ones_like(ids)
        return model.language_model(
            inputs_embeds=embeds, attention_mask=everywhere, use_cache=False
        ).logits

    learnt, before, after = map(logits, models)
print(json.dumps({"off": float((after - learnt).abs().mean()),
                  "moved": float((after - before).abs().mean())}))
"""


def test_a_converted_model_answers_as_its_base_with_the_adapters(
    site: Site, straight: Run, converted: Path
) -> None:
    checkpoint = str(straight.checkpoints()[-1].path)
    folders = [str(site.base), str(converted)]
    finished = run_command([sys.executable, "-c", ASK, straight.order.config, checkpoint, *folders])
    assert finished.status == 0, finished.output[-3000:]
    answer = json.loads(finished.output.splitlines()[-1])
    # What is left is the rounding of merged weights to bfloat16.
    assert answer["off"] < answer["moved"] / 50


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
