"""The body that creates a fine-tune: what is accepted, and what is refused by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from api.errors import from_validation
from api.schemas.finetune_request import CreateFinetune
from shared.errors import InvalidRequest
from shared.finetunes import DataSource, Recipe

BODY = {"model": "base", "training_file": "file-a"}


def asked(**changes: Any) -> CreateFinetune:
    """The body with these changes, read as it comes over the wire, and checked."""
    found = CreateFinetune.model_validate_json(json.dumps({**BODY, **changes}))
    found.check()
    return found


def refusal(**changes: Any) -> InvalidRequest:
    """What is said against it."""
    try:
        asked(**changes)
    except ValidationError as error:
        return from_validation(error)
    except InvalidRequest as error:
        return error
    raise AssertionError(f"{changes} was accepted")


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    """OpenAI's newer form."""
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_nothing_but_model_and_file_gives_the_defaults() -> None:
    """The recipe and the source of data are those of the records."""
    plain = asked()
    assert plain.recipe() == Recipe()
    assert plain.data() == DataSource(training_file="file-a")


def test_every_option_of_the_records_can_be_given() -> None:
    """Given a value for each field that OpenAI lacks, then it arrives in recipe and data."""
    recipe = Recipe(
        method="lora",
        n_epochs=2,
        batch_size=16,
        learning_rate=1e-4,
        warmup_ratio=0.1,
        weight_decay=0.01,
        lora_rank=8,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_targets=("llm", "vit"),
        max_length=1024,
        save_every=50,
        keep_checkpoints=5,
        deepspeed="zero3",
        gpus=2,
        gradient_checkpointing=False,
    )
    data = DataSource(
        training_file="file-a",
        format="llava",
        images="file-b",
        max_bad_share=0.5,
        held_out_share=0.2,
        max_held_out=10,
        max_compared=5,
        prompt="What is it?",
        keep_flagged=True,
    )
    of_openai = ("n_epochs", "batch_size", "learning_rate_multiplier")
    files = ("training_file", "validation_file")
    options = {
        name: getattr(record, name)
        for record, theirs in ((recipe, of_openai), (data, files))
        for name in record.__struct_fields__
        if name not in theirs
    }
    whole = asked(method=supervised(n_epochs=2, batch_size=16), vlmq=options)
    assert whole.recipe() == recipe
    assert whole.data() == data


@pytest.mark.parametrize("form", ["method", "hyperparameters"])
def test_both_forms_of_hyperparameters_mean_the_same(form: str) -> None:
    """The newer and the older place are read alike; ``auto`` leaves the choice to the server."""
    given = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    body = {form: supervised(**given) if form == "method" else given}
    recipe = asked(**body).recipe()
    assert (recipe.n_epochs, recipe.batch_size) == (3, None)
    assert recipe.learning_rate_multiplier == 0.5


def test_null_is_nothing_said() -> None:
    """Clients that send null for what they leave out are understood."""
    nulls = dict.fromkeys(
        ("validation_file", "suffix", "seed", "method", "hyperparameters", "metadata")
    )
    assert asked(**nulls, integrations=None).recipe() == Recipe()
    assert asked(integrations=[], vlmq={"save_every": None}).recipe() == Recipe()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": 1}, "model"),
        ({"model": ""}, "model"),
        ({"training_file": None}, "training_file"),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "a b"}, "suffix"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "../x"}, "suffix"),
        ({"suffix": "a..b"}, "suffix"),
        ({"suffix": "a\n"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
        ({"method": supervised(learning_rate_multiplier=0)}, "method.supervised"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"n_epochs": 3}, "n_epochs"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"vlmq": {"lora_rnk": 8}}, "vlmq.lora_rnk"),
        ({"vlmq": {"method": "dora"}}, "vlmq.method"),
        ({"vlmq": {"learning_rate": 2}}, "vlmq.learning_rate"),
        ({"vlmq": {"warmup_ratio": 1}}, "vlmq.warmup_ratio"),
        ({"vlmq": {"lora_rank": 0}}, "vlmq.lora_rank"),
        ({"vlmq": {"lora_rank": None}}, "vlmq.lora_rank"),
        ({"vlmq": {"lora_dropout": 1}}, "vlmq.lora_dropout"),
        ({"vlmq": {"lora_targets": []}}, "vlmq.lora_targets"),
        ({"vlmq": {"lora_targets": ["llm", "llm"]}}, "vlmq.lora_targets"),
        ({"vlmq": {"lora_targets": ["head"]}}, "vlmq.lora_targets"),
        ({"vlmq": {"max_length": 1}}, "vlmq.max_length"),
        ({"vlmq": {"save_every": 0}}, "vlmq.save_every"),
        ({"vlmq": {"keep_checkpoints": 1}}, "vlmq.keep_checkpoints"),
        ({"vlmq": {"deepspeed": "zero9"}}, "vlmq.deepspeed"),
        ({"vlmq": {"gpus": 0}}, "vlmq.gpus"),
        ({"vlmq": {"gradient_checkpointing": 1}}, "vlmq.gradient_checkpointing"),
        ({"vlmq": {"format": "csv"}}, "vlmq.format"),
        ({"vlmq": {"max_bad_share": 1.1}}, "vlmq.max_bad_share"),
        ({"vlmq": {"held_out_share": 1}}, "vlmq.held_out_share"),
        ({"vlmq": {"max_held_out": 0}}, "vlmq.max_held_out"),
        ({"vlmq": {"max_compared": 0}}, "vlmq.max_compared"),
    ],
)
def test_a_bad_field_is_named(changes: dict[str, Any], param: str) -> None:
    """Wrong types, values out of range and unknown keys are refused under their full name."""
    assert (refusal(**changes).param or "").startswith(param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"hyperparameters": {"n_epochs": 1}, "method": supervised(n_epochs=1)}, "hyperparameters"),
        (
            {
                "hyperparameters": {"learning_rate_multiplier": 2},
                "vlmq": {"learning_rate": 1e-4},
            },
            "vlmq.learning_rate",
        ),
        ({"vlmq": {"method": "full", "lora_rank": 8}}, "vlmq.lora_rank"),
        ({"vlmq": {"method": "qlora", "deepspeed": "zero3"}}, "vlmq.deepspeed"),
        ({"vlmq": {"gpus": 4}, "hyperparameters": {"batch_size": 6}}, "hyperparameters.batch_size"),
        ({"validation_file": "file-b", "vlmq": {"held_out_share": 0.1}}, "vlmq.held_out_share"),
        ({"training_file": "batch_a", "vlmq": {"format": "llava"}}, "vlmq.format"),
        ({"vlmq": {"config_file": "file-c", "max_length": 100}}, "vlmq.max_length"),
        (
            {"vlmq": {"config_file": "file-c"}, "hyperparameters": {"n_epochs": 1}},
            "hyperparameters.n_epochs",
        ),
        (
            {"vlmq": {"config_file": "file-c"}, "method": supervised(batch_size=1)},
            "method.supervised.hyperparameters.batch_size",
        ),
    ],
)
def test_what_cannot_hold_together_is_refused(changes: dict[str, Any], param: str) -> None:
    """Nothing that was asked for is silently without effect."""
    assert refusal(**changes).param == param


def test_the_parts_that_are_tuned_are_chosen_for_every_method() -> None:
    """``lora_targets`` names the parts, also where they are tuned whole."""
    recipe = asked(vlmq={"method": "full", "lora_targets": ["vit"]}).recipe()
    assert (recipe.method, recipe.lora_targets) == ("full", ("vit",))


def test_a_batch_may_be_what_is_learned_from() -> None:
    """Its id stands in for a file, with the format said or not."""
    for options in ({}, {"format": "batch"}):
        assert asked(training_file="batch_a", vlmq=options).data().training_file == "batch_a"
