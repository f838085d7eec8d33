"""What creates a fine-tune: OpenAI's body, and under ``vlmq`` what that lacks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, field_validator

from api.schemas.batches import Metadata
from api.schemas.common import Body
from shared.captions import MAX_TEXT
from shared.errors import InvalidValue, UnsupportedParameter
from shared.finetunes import DataFormat, DataSource, DeepSpeedStage, Recipe, TuningMethod

MAX_SEED = 2**31 - 1
_RECIPE = Recipe()
_DATA = DataSource(training_file="")


def _none_for_auto(value: object) -> object:
    """OpenAI's word for what the server chooses is ``"auto"``; in records it is ``None``."""
    if value == "auto":
        return None
    if isinstance(value, str):
        raise ValueError('give a number or "auto"')  # noqa: TRY004 - pydantic wants this one
    return value


def _each_once(targets: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(targets)) != len(targets):
        raise ValueError("name each part once")
    return targets


def _no_dots(suffix: str) -> str:
    # A model's name could not hold them: they mean another folder to some file systems.
    if ".." in suffix:
        raise ValueError("two dots must not follow one another")
    return suffix


FileId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Suffix = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$"), AfterValidator(_no_dots)
]
Epochs = Annotated[Annotated[int, Field(ge=1, le=1000)] | None, BeforeValidator(_none_for_auto)]
BatchSize = Annotated[Annotated[int, Field(ge=1, le=4096)] | None, BeforeValidator(_none_for_auto)]
Multiplier = Annotated[
    Annotated[float, Field(gt=0, le=1000)] | None, BeforeValidator(_none_for_auto)
]
Rate = Annotated[Annotated[float, Field(gt=0, le=1)] | None, BeforeValidator(_none_for_auto)]
Warmup = Annotated[Annotated[float, Field(ge=0, lt=1)] | None, BeforeValidator(_none_for_auto)]
Decay = Annotated[Annotated[float, Field(ge=0, le=1)] | None, BeforeValidator(_none_for_auto)]
Steps = Annotated[Annotated[int, Field(ge=1, le=1_000_000)] | None, BeforeValidator(_none_for_auto)]
Switch = Annotated[bool | None, BeforeValidator(_none_for_auto)]
Targets = Annotated[
    tuple[Literal["llm", "vit"], ...], Field(min_length=1), AfterValidator(_each_once)
]


class Hyperparameters(Body):
    """OpenAI's three; ``"auto"`` and null let the server choose."""

    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None
    n_epochs: Epochs = None


class Supervised(Body):
    """The settings of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """How to tune. Only supervised fine-tuning there is."""

    type: Literal["supervised"]
    supervised: Supervised | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _only_supervised(cls, value: object) -> object:
        if isinstance(value, str) and value != "supervised":
            raise UnsupportedParameter(
                f"the method '{value[:32]}' is not supported; only 'supervised' is",
                param="method.type",
            )
        return value


class Options(Body):
    """The key ``vlmq``: how to train and on what, beyond OpenAI's parameters."""

    method: TuningMethod = _RECIPE.method
    learning_rate: Rate = None
    warmup_ratio: Warmup = None
    weight_decay: Decay = None
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = _RECIPE.lora_rank
    lora_alpha: Annotated[int, Field(ge=1, le=4096)] = _RECIPE.lora_alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = _RECIPE.lora_dropout
    lora_targets: Targets = _RECIPE.lora_targets
    max_length: Annotated[int, Field(ge=64, le=131_072)] = _RECIPE.max_length
    save_every: Steps = None
    keep_checkpoints: Annotated[int, Field(ge=2, le=1000)] = _RECIPE.keep_checkpoints
    deepspeed: DeepSpeedStage = _RECIPE.deepspeed
    gpus: Annotated[int, Field(ge=1, le=64)] = _RECIPE.gpus
    gradient_checkpointing: Switch = None
    format: DataFormat = _DATA.format
    images: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = _DATA.max_bad_share
    held_out_share: Annotated[float, Field(ge=0, le=0.9)] = _DATA.held_out_share
    max_held_out: Annotated[int, Field(ge=1, le=100_000)] = _DATA.max_held_out
    max_compared: Annotated[int, Field(ge=1, le=10_000)] = _DATA.max_compared
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)] | None = None
    keep_flagged: bool = _DATA.keep_flagged
    config_file: FileId | None = None

    @property
    def given(self) -> frozenset[str]:
        """The options that were named and are not null."""
        return frozenset(name for name in self.model_fields_set if getattr(self, name) is not None)


class CreateFinetune(Body):
    """The body of ``POST /v1/fine_tuning/jobs``."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older form of ``method.supervised.hyperparameters``."""
    integrations: Any = None
    metadata: Metadata | None = None
    vlmq: Options = Options()

    @field_validator("integrations")
    @classmethod
    def _no_integrations(cls, value: object) -> None:
        if value:
            raise UnsupportedParameter(
                "the parameter 'integrations' is not supported", param="integrations"
            )

    def check(self) -> None:
        """Refuse what cannot hold together. Raises: InvalidValue naming the parameter to leave out."""
        self._check_hyperparameters()
        options = self.vlmq
        if options.method == "full":
            _refuse(options.given, _LORA_ONLY, "has no meaning with the method 'full'")
        if options.method == "qlora" and options.deepspeed.startswith("zero3"):
            raise InvalidValue(
                "vlmq.deepspeed: the quantized weights of 'qlora' cannot be split; use 'zero2'",
                param="vlmq.deepspeed",
            )
        if self.validation_file is not None:
            why = "has no meaning beside a validation_file, whose rows are the ones held out"
            _refuse(options.given, frozenset({"held_out_share"}), why)
        if self.training_file.startswith("batch_") and options.format not in {"auto", "batch"}:
            raise InvalidValue(
                f"vlmq.format: '{options.format}' does not fit the training_file "
                f"'{self.training_file}', which is a batch; leave it out",
                param="vlmq.format",
            )

    def _check_hyperparameters(self) -> None:
        theirs, options = self.chosen, self.vlmq
        if self.hyperparameters is not None and self._of_method is not None:
            raise InvalidValue(
                "give hyperparameters once, in method.supervised.hyperparameters",
                param="hyperparameters",
            )
        if theirs.learning_rate_multiplier is not None and options.learning_rate is not None:
            raise InvalidValue(
                "give learning_rate_multiplier or vlmq.learning_rate, not both",
                param="vlmq.learning_rate",
            )
        if theirs.batch_size is not None and theirs.batch_size % options.gpus:
            raise InvalidValue(
                f"batch_size counts the rows of all GPUs; {theirs.batch_size} is no multiple of "
                f"the {options.gpus} of vlmq.gpus",
                param=f"{self._where}.batch_size",
            )
        if options.config_file is None:
            return
        why = "is decided by the configuration in vlmq.config_file; leave it out"
        _refuse(options.given, _IN_CONFIG, why)
        for name in type(theirs).model_fields:
            if getattr(theirs, name) is not None:
                raise InvalidValue(f"{name} {why}", param=f"{self._where}.{name}")

    @property
    def chosen(self) -> Hyperparameters:
        """The hyperparameters, from whichever place they were given in."""
        return self._of_method or self.hyperparameters or Hyperparameters()

    def recipe(self) -> Recipe:
        """How to train."""
        fields = {**dict(self.chosen), **dict(self.vlmq)}
        return msgspec.convert(_only(fields, Recipe), Recipe)

    def data(self) -> DataSource:
        """What to learn from."""
        files = {"training_file": self.training_file, "validation_file": self.validation_file}
        return msgspec.convert(_only({**dict(self.vlmq), **files}, DataSource), DataSource)

    @property
    def _of_method(self) -> Hyperparameters | None:
        supervised = self.method.supervised if self.method else None
        return supervised.hyperparameters if supervised else None

    @property
    def _where(self) -> str:
        return "hyperparameters" if self.hyperparameters else "method.supervised.hyperparameters"


_LORA_ONLY = frozenset({"lora_rank", "lora_alpha", "lora_dropout"})
_IN_CONFIG = _LORA_ONLY | {
    "method",
    "lora_targets",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_length",
    "gradient_checkpointing",
}


def _refuse(given: frozenset[str], names: frozenset[str], why: str) -> None:
    for name in sorted(given & names):
        raise InvalidValue(f"vlmq.{name} {why}", param=f"vlmq.{name}")


def _only(fields: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {name: fields[name] for name in kind.__struct_fields__ if name in fields}
