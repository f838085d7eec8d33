"""The trainer with real xtuner and DeepSpeed: what it leaves, how it ends, how it goes on."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training_runs import Run, Site, wait_until
from workers.inference.internvl.load import load
from workers.inference.tiny import CHECKPOINT
from workers.training.orders import TrainerExit, read_verdict
from workers.training.saved import SEAL, checkpoint_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 12
LORA: dict[str, Any] = {"warmup_ratio": 0.2, "save_every": 2, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """48 scenes and the tiny base: 6 steps of 8 samples per epoch."""
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def straight(site: Site) -> Run:
    """Twelve steps of two iterations each, with dropout, trained in one go."""
    run = site.run(LORA, micro_batch_size=4)
    finished = run.run()
    assert finished.status == TrainerExit.TRAINED, finished.output[-3000:]
    return run


def test_every_step_is_reported_and_the_loss_falls(straight: Run) -> None:
    metrics = straight.metrics()
    assert [metric.step for metric in metrics] == list(range(1, STEPS + 1))
    assert {metric.total_steps for metric in metrics} == {STEPS}
    assert metrics[-1].epoch == 2.0
    assert metrics[-1].eta_s == 0
    first, last = metrics[0].loss, metrics[-1].loss
    assert first is not None
    assert last is not None
    assert last < first / 2


def test_the_rate_rises_to_its_peak_and_falls_to_nothing(straight: Run) -> None:
    """A short warm-up in mmengine's own counting would stay at a hundred-thousandth for ever."""
    rates = [metric.learning_rate for metric in straight.metrics()]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[0] < max(rates)
    assert rates[-1] < 1e-4


def test_the_newest_checkpoints_are_kept_whole_and_only_they(straight: Run) -> None:
    assert [saved.step for saved in straight.checkpoints()] == [8, 10, 12]
    folders = sorted(path.name for path in straight.work_dir.glob("iter_*"))
    assert folders == ["iter_16.pth", "iter_20.pth", "iter_24.pth"]
    assert (straight.work_dir / "last_checkpoint").read_text().endswith("iter_24.pth")


def test_a_checkpoint_takes_what_was_estimated(straight: Run) -> None:
    expected = straight.resolved.checkpoint_bytes
    assert straight.checkpoints()[0].size_bytes == pytest.approx(expected, rel=0.3)


def test_nothing_was_compiled(straight: Run) -> None:
    """DeepSpeed would build an operation with g++ and ninja at its first use, for half a minute."""
    assert not (straight.work_dir / "cache" / "torch_extensions").exists()


def test_lora_is_on_what_was_named_and_not_on_the_head(straight: Run) -> None:
    folder = straight.checkpoints()[-1].path
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    tuned = {name.split(".lora_")[0].rpartition(".")[2] for name in saved if ".lora_" in name}
    assert tuned == {"wqkv", "wo", "w1", "w2", "w3"}
    assert not any("vision_model" in name for name in saved)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(site: Site, straight: Run) -> None:
    """Mid-epoch and with dropout: the same samples, losses and rates to the last digit."""
    first = site.run({**LORA, "save_every": 100}, micro_batch_size=4)
    with first.started() as process:
        wait_until(lambda: len(first.metrics()) >= 2, "the second step")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == TrainerExit.STOPPED, first.log()[-3000:]
    (saved,) = first.checkpoints()
    assert saved.iteration % 2 == 0
    assert saved.step < STEPS, "it was too late to stop"
    second = site.run(LORA, micro_batch_size=4, resume=str(saved.path))
    assert second.run().status == TrainerExit.TRAINED
    expected = {metric.step: metric for metric in straight.metrics()}
    for metric in [*first.metrics(), *second.metrics()]:
        assert metric.loss == expected[metric.step].loss
        assert metric.learning_rate == expected[metric.step].learning_rate
    assert sorted(first.losses() | second.losses()) == list(range(1, STEPS + 1))
    assert not first.losses().keys() & second.losses().keys()


def test_a_stop_before_anything_was_learnt_ends_at_once(site: Site) -> None:
    run = site.run(LORA)
    with run.started() as process:
        wait_until(lambda: listens(process.pid), "the handler")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == TrainerExit.STOPPED
    assert run.checkpoints() == []


def test_the_same_configuration_gives_stock_xtuners_losses(site: Site, straight: Run) -> None:
    """Stock train.py knows nothing of this project; its data order in the first epoch is the same."""
    stock = site.run({**LORA, "lora_dropout": 0.0, "n_epochs": 1}, micro_batch_size=4)
    ours = site.run({**LORA, "lora_dropout": 0.0, "n_epochs": 1}, micro_batch_size=4)
    finished = stock.run_stock()
    assert finished.status == 0, finished.output[-3000:]
    assert ours.run().status == TrainerExit.TRAINED
    (stock.work_dir / "run.json").write_bytes((ours.work_dir / "run.json").read_bytes())
    assert len(stock.losses()) == 6
    assert list(stock.losses().values()) == pytest.approx(list(ours.losses().values()), rel=1e-3)


def test_a_loss_that_is_no_number_fails_the_run_and_is_not_saved(site: Site) -> None:
    run = site.run({"learning_rate": 1e30, "warmup_ratio": 0.0, "save_every": 1})
    finished = run.run()
    assert finished.status == TrainerExit.LOSS_BAD, finished.output[-3000:]
    verdict = read_verdict(run.work_dir)
    assert verdict is not None
    assert verdict.reason in ("nan", "diverged")
    assert f"at step {verdict.step}" in verdict.message
    for saved in run.checkpoints():
        assert saved.loss is not None
        assert math.isfinite(saved.loss)
        assert weights_are_numbers(saved.path)


def test_no_checkpoint_is_begun_that_would_fill_the_disk(site: Site) -> None:
    run = site.run(LORA, min_free_bytes=1 << 60)
    assert run.run().status == TrainerExit.DISK_FULL
    assert list(run.work_dir.glob("iter_*")) == []
    verdict = read_verdict(run.work_dir)
    assert verdict is not None
    assert verdict.reason == "disk"
    assert "MiB" in verdict.message


def test_an_image_that_went_away_ends_the_run_by_name(tmp_path: Path) -> None:
    """xtuner would train on another one drawn at random, or try 1,001 times."""
    site = Site(tmp_path / "site", rows=16)
    (site.root / "images" / "3.png").unlink()
    Image.new("RGB", (64, 64)).save(site.root / "images" / "other.png")
    finished = site.run(LORA).run()
    assert finished.status not in set(TrainerExit)
    assert "3.png can no longer be read" in finished.output


# --- conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(site: Site, straight: Run) -> Path:
    """The straight run's last checkpoint as a model folder."""
    out = site.root / "model"
    finished = site.convert(straight, straight.checkpoints()[-1].path, out)
    assert finished.status == 0, finished.output[-3000:]
    return out


def test_a_converted_model_has_all_of_its_bases_files(converted: Path) -> None:
    assert {path.name for path in CHECKPOINT.iterdir()} == {
        path.name for path in converted.iterdir()
    }
    same = [path.name for path in CHECKPOINT.iterdir() if path.name != "model.safetensors"]
    for name in same:
        assert (converted / name).read_bytes() == (CHECKPOINT / name).read_bytes()


def test_a_converted_model_loads_in_the_serving_engine_with_lora_merged(converted: Path) -> None:
    device = torch.device("cpu")
    base, tuned = (
        load(folder, trust_remote_code=False, device=device, dtype=None)
        for folder in (CHECKPOINT, converted)
    )
    before, after = (weights(one) for one in (base, tuned))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 2)[1] for name in changed if "language" in name} == {
        "wqkv",
        "wo",
        "w1",
        "w2",
        "w3",
    }
    assert not any("vision_model" in name for name in changed)


def test_a_base_with_code_passes_it_on(site: Site, straight: Run, tmp_path: Path) -> None:
    """xtuner's converter leaves modeling code and processor files out."""
    coded = site.root / "base"
    order = site.run(LORA, base=str(coded))
    out = tmp_path / "model"
    finished = site.convert(order, straight.checkpoints()[-1].path, out)
    assert finished.status == 0, finished.output[-3000:]
    for name in ("modeling_internvl_chat.py", "preprocessor_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (coded / name).read_bytes()
    assert load(out, trust_remote_code=True, device=torch.device("cpu"), dtype=None).ends


@pytest.mark.parametrize("deepspeed", ["zero1", "zero3"])
def test_lora_on_both_towers_is_learnt_and_merged(tmp_path: Path, deepspeed: str) -> None:
    site = Site(tmp_path / "site", rows=16)
    recipe = {"lora_targets": ["llm", "vit"], "lora_rank": 8, "deepspeed": deepspeed}
    run = site.run({**recipe, "gradient_checkpointing": deepspeed == "zero1"})
    assert run.run().status == TrainerExit.TRAINED
    losses = list(run.losses().values())
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0] / 1.5
    finished = site.convert(run, run.checkpoints()[-1].path, tmp_path / "model")
    assert finished.status == 0, finished.output[-3000:]
    before, after = (
        weights(load(folder, trust_remote_code=False, device=torch.device("cpu"), dtype=None))
        for folder in (CHECKPOINT, tmp_path / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "attention.wqkv", "mlp1.1"):
        assert any(f"{layer}.weight" in name for name in changed), layer
    assert not any("output" in name or "norm" in name for name in changed)


def test_half_a_checkpoint_is_not_converted(site: Site, straight: Run, tmp_path: Path) -> None:
    half = tmp_path / "iter_24.pth"
    shutil.copytree(straight.checkpoints()[-1].path, half)
    (half / SEAL).unlink()
    assert checkpoint_at(half) is None
    finished = site.convert(straight, half, tmp_path / "model")
    assert finished.status == 1
    assert "is not whole" in finished.output
    assert not (tmp_path / "model").exists()


def listens(pid: int) -> bool:
    """Whether a process handles SIGTERM by itself."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def weights(loaded: Any) -> dict[str, torch.Tensor]:
    return dict(loaded.backbone._model.named_parameters())


def weights_are_numbers(folder: Path) -> bool:
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    return all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())
