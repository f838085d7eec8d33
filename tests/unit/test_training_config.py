"""Recipes to configurations: each "auto", each refusal, the template."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.errors import InvalidRequest, StorageFull
from shared.finetunes import Recipe
from workers.inference.tiny import CHECKPOINT
from workers.training.base_facts import BaseFacts, Tower, read_base_facts
from workers.training.config import (
    Hardware,
    Resolved,
    TrainingPaths,
    checkpoint_size,
    deepspeed_file,
    fill,
    render,
    resolve,
    training_template,
)

GIB = 1 << 30
H200 = Hardware(gpus=1, memory_bytes=140 * GIB, cores=16, free_disk_bytes=1 << 42)
CPU = Hardware(gpus=0, memory_bytes=16 * GIB, cores=2, free_disk_bytes=1 << 40)
PATHS = TrainingPaths(Path("/m/base"), Path("/d/train.json"), Path("/d/images"))


def tower(layers: int, hidden: int, intermediate: int, shapes: dict[str, tuple[int, int]]) -> Tower:
    listed = {name: [shape] * layers for name, shape in shapes.items()}
    return Tower(layers, hidden, intermediate, 0, listed)


def internvl2_2b() -> BaseFacts:
    llm = tower(
        24,
        2048,
        8192,
        {
            "wqkv": (4096, 2048),
            "wo": (2048, 2048),
            "w1": (8192, 2048),
            "w2": (2048, 8192),
            "w3": (8192, 2048),
        },
    )
    vit = tower(24, 1024, 4096, {"attn.qkv": (3072, 1024), "attn.proj": (1024, 1024)})
    return BaseFacts(
        language="internlm2",
        llm=msgspec.structs.replace(llm, parameters=1_889_110_016),
        vit=msgspec.structs.replace(vit, parameters=304_012_288),
        projector_parameters=12_609_536,
        vocabulary=92553,
        tokens_per_tile=256,
        max_tiles=13,
        context=32768,
        has_code=True,
        weights_bytes=4_411_571_040,
    )


def resolved(
    rows: int = 1000, hardware: Hardware = H200, base: BaseFacts | None = None, **recipe: Any
) -> Resolved:
    return resolve(
        Recipe(**recipe),
        rows=rows,
        longest_tokens=3410,
        seed=7,
        base=base or internvl2_2b(),
        hardware=hardware,
    )


def test_what_is_left_open_is_the_tutorials_recipe() -> None:
    chosen = resolved()
    assert (chosen.lora_rank, chosen.lora_alpha, chosen.lora_dropout) == (128, 256, 0.05)
    assert (chosen.batch_size, chosen.n_epochs, chosen.learning_rate) == (8, 10, 3e-5)
    assert (chosen.weight_decay, chosen.max_length, chosen.deepspeed) == (0.05, 8192, "zero2")
    assert chosen.total_steps == 1250
    assert chosen.warmup_steps == round(0.03 * 1250)
    assert chosen.tuned == ("llm",)


def test_the_templates_own_values_are_the_tutorials() -> None:
    values = assignments(training_template().read_text(encoding="utf-8"))
    assert (values["batch_size"], values["accumulative_counts"], values["max_epochs"]) == (4, 2, 10)
    assert (values["lora_rank"], values["lora_alpha"], values["lora_dropout"]) == (128, 256, 0.05)
    assert (values["lr"], values["weight_decay"], values["max_length"]) == (3e-5, 0.05, 8192)
    assert values["save_iterations"] == 64


def test_memory_decides_about_checkpointing_and_accumulation() -> None:
    fits_all = resolved(hardware=msgspec.structs.replace(H200, memory_bytes=180 * GIB))
    h200 = resolved()
    h100 = resolved(hardware=msgspec.structs.replace(H200, memory_bytes=79 * GIB))
    small = resolved(hardware=msgspec.structs.replace(H200, memory_bytes=20 * GIB))
    shape = [
        (one.micro_batch_size, one.accumulation, one.gradient_checkpointing)
        for one in (fits_all, h200, h100, small)
    ]
    assert shape == [(8, 1, False), (8, 1, False), (4, 2, False), (2, 4, True)]


def test_gradient_checkpointing_can_be_chosen() -> None:
    assert resolved(gradient_checkpointing=True).gradient_checkpointing
    assert not resolved(gradient_checkpointing=False).gradient_checkpointing


def test_a_step_has_the_same_samples_on_any_number_of_gpus() -> None:
    two = resolved(hardware=msgspec.structs.replace(H200, gpus=2))
    assert (two.batch_size, two.micro_batch_size * two.accumulation) == (8, 4)
    assert two.total_steps == resolved().total_steps
    three = resolved(hardware=msgspec.structs.replace(H200, gpus=3))
    assert three.batch_size == 9


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 26])
def test_a_short_run_has_no_warm_up_that_would_crash_or_last_for_ever(rows: int) -> None:
    chosen = resolved(rows=rows, n_epochs=1)
    assert chosen.total_steps >= 1
    iterations = chosen.warmup_steps * chosen.accumulation
    assert iterations == 0 or 2 <= iterations < chosen.total_steps * chosen.accumulation


def test_a_warm_up_of_the_whole_run_still_ends_before_it() -> None:
    chosen = resolved(rows=64, n_epochs=1, warmup_ratio=0.99)
    assert chosen.warmup_steps < chosen.total_steps


def test_checkpoints_are_saved_ten_times_and_never_far_apart() -> None:
    assert resolved().save_every == 125
    assert resolved(rows=3, n_epochs=1).save_every == 1
    assert resolved(rows=1_000_000).save_every == 500
    assert resolved(save_every=64).save_every == 64


def test_the_disk_estimate_is_what_a_run_of_2b_wrote() -> None:
    # Measured with LoRA on the head, too: 287 MiB of weights, 2.0 GiB with the optimizer's state.
    head = 128 * (92553 + 2048)
    trained = resolved().trained_parameters + head
    assert trained * 2 == pytest.approx(287 * (1 << 20), rel=0.01)
    assert checkpoint_size(trained) == pytest.approx(2.0 * GIB, rel=0.03)
    assert resolved().disk_bytes > 4 * resolved().checkpoint_bytes
    with pytest.raises(StorageFull, match="keep_checkpoints"):
        resolved(hardware=msgspec.structs.replace(H200, free_disk_bytes=GIB))


def test_lora_on_the_vit_and_full_tuning_train_more() -> None:
    counts = [
        resolved(**recipe).trained_parameters
        for recipe in (
            {},
            {"lora_targets": ("llm", "vit")},
            {"method": "full"},
            {"method": "full", "lora_targets": ("llm", "vit")},
        )
    ]
    assert counts == sorted(counts)
    assert counts[-1] == internvl2_2b().parameters


def test_rates_are_the_methods_times_the_multiplier() -> None:
    assert resolved(learning_rate_multiplier=2).learning_rate == 6e-5
    assert resolved(learning_rate=1e-3, learning_rate_multiplier=0.5).learning_rate == 5e-4
    assert resolved(method="full").learning_rate == 1e-5


@pytest.mark.parametrize(
    ("recipe", "hardware", "field"),
    [
        ({"keep_checkpoints": 1}, H200, "keep_checkpoints"),
        ({"batch_size": 0}, H200, "batch_size"),
        ({"batch_size": 3}, msgspec.structs.replace(H200, gpus=2), "batch_size"),
        ({"n_epochs": 0}, H200, "n_epochs"),
        ({"save_every": 0}, H200, "save_every"),
        ({"learning_rate": float("nan")}, H200, "learning_rate"),
        ({"learning_rate_multiplier": -1}, H200, "learning_rate_multiplier"),
        ({"warmup_ratio": 1.0}, H200, "warmup_ratio"),
        ({"max_length": 40000}, H200, "max_length"),
        ({"lora_targets": ()}, H200, "lora_targets"),
        ({"method": "qlora"}, CPU, "method"),
        ({"method": "qlora", "deepspeed": "zero3"}, H200, "deepspeed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    recipe: dict[str, Any], hardware: Hardware, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(hardware=hardware, **recipe)
    assert caught.value.param == field
    assert field in caught.value.message


def test_zero3_keeps_the_activations_of_a_base_without_code() -> None:
    plain = msgspec.structs.replace(internvl2_2b(), has_code=False)
    small = msgspec.structs.replace(H200, memory_bytes=20 * GIB)
    assert resolved(base=plain, hardware=small).gradient_checkpointing
    assert not resolved(base=plain, hardware=small, deepspeed="zero3").gradient_checkpointing
    with pytest.raises(InvalidRequest, match="gradient_checkpointing"):
        resolved(base=plain, deepspeed="zero3", gradient_checkpointing=True)


def test_fewer_rows_than_gpus_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="too few"):
        resolved(rows=1, hardware=msgspec.structs.replace(H200, gpus=2))


# --- the base ------------------------------------------------------------------------------------


def test_a_bases_sizes_are_read_from_its_folder() -> None:
    facts = read_base_facts(CHECKPOINT)
    assert (facts.language, facts.tokens_per_tile, facts.max_tiles) == ("internlm2", 4, 13)
    assert facts.llm.shapes["wqkv"] == [(128, 64)] * 3
    assert facts.vit.shapes["attn.qkv"] == [(192, 64)] * 2
    assert facts.parameters == pytest.approx(413_000, rel=0.05)
    assert not facts.has_code


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_config": {"architectures": ["Qwen2ForCausalLM"]}}, "Qwen2ForCausalLM"),
        ({"model_type": "llava"}, "llava"),
        ({"vision_config": None}, "not an InternVL2"),
    ],
)
def test_other_models_are_refused_with_what_can_be_tuned(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_base_facts(tmp_path / "base")
    assert caught.value.param == "model"


# --- rendering -----------------------------------------------------------------------------------


def assignments(text: str) -> dict[str, Any]:
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue  # not a setting
    return found


def test_a_rendered_configuration_says_what_was_resolved() -> None:
    chosen = resolved(rows=100, n_epochs=2, learning_rate=2e-4, save_every=5)
    values = assignments(render(chosen, PATHS))
    assert values["model_path"] == "/m/base"
    assert values["data_path"] == "/d/train.json"
    assert values["lr"] == 2e-4
    assert values["total_iterations"] == chosen.total_steps * chosen.accumulation
    assert values["save_iterations"] == 5 * chosen.accumulation
    assert values["seed"] == 7


def test_lora_never_goes_on_the_head() -> None:
    values = assignments(render(resolved(), PATHS))
    assert values["llm_targets"] == ["wqkv", "wo", "w1", "w2", "w3"]
    assert "output" not in values["llm_targets"]
    assert values["vit_targets"]


def test_hostile_names_stay_text() -> None:
    hostile = Path("/d/'; import os; os.abort() #\n\\")
    text = render(resolved(), TrainingPaths(hostile, hostile, hostile))
    assert assignments(text)["data_path"] == str(hostile)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(KeyError):
        fill("a = 1\n", {"b": 2})
    assert (
        fill("a = 1  # one\nb = 'é'  # two\n", {"a": [1], "b": "ü"})
        == "a = [1]  # one\nb = 'ü'  # two\n"
    )


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_deepspeed_computes_in_bfloat16_everywhere(stage: Any) -> None:
    settings = json.loads(deepspeed_file(stage).read_text())
    assert settings["bf16"]["enabled"] is True
    assert settings["fp16"]["enabled"] is False
    assert settings["zero_optimization"]["stage"] == int(stage[4])
    # AdamW of torch: DeepSpeed's own for the processor would have to be compiled first.
    assert settings["zero_force_ds_cpu_optimizer"] is False
