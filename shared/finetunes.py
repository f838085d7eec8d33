"""What a fine-tune is: its states, what was asked for, how it stands, what happened to it.

Records only; ``shared.finetune_store`` keeps them. A request to pause or to cancel is a field,
``wanted``, not a state: whoever works on the job sees it with the next renewal of its lease and
changes the state when the work has stopped; a job that nobody holds changes at once.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec


class FinetuneState(enum.StrEnum):
    """Where a fine-tune is on its way. The values are OpenAI's."""

    VALIDATING_FILES = "validating_files"
    """Recorded; its rows and images are not yet checked."""
    QUEUED = "queued"
    """Its data is good; it waits for a worker with GPUs, also after a worker died."""
    RUNNING = "running"
    """A worker holds it: training, converting or comparing."""
    PAUSED = "paused"
    """Its owner stopped it for a while; it goes on from its last checkpoint."""
    SUCCEEDED = "succeeded"
    """The tuned model answers and is registered."""
    FAILED = "failed"
    """It could not be finished; the error says why, checkpoints are kept."""
    CANCELLED = "cancelled"
    """Its owner stopped it for good; checkpoints are kept."""


FINETUNE_TRANSITIONS: dict[FinetuneState, frozenset[FinetuneState]] = {
    FinetuneState.VALIDATING_FILES: frozenset(
        {
            FinetuneState.QUEUED,
            FinetuneState.PAUSED,
            FinetuneState.FAILED,
            FinetuneState.CANCELLED,
        }
    ),
    FinetuneState.QUEUED: frozenset(
        {
            FinetuneState.RUNNING,
            FinetuneState.PAUSED,
            FinetuneState.FAILED,
            FinetuneState.CANCELLED,
        }
    ),
    FinetuneState.RUNNING: frozenset(
        {
            FinetuneState.QUEUED,
            FinetuneState.PAUSED,
            FinetuneState.SUCCEEDED,
            FinetuneState.FAILED,
            FinetuneState.CANCELLED,
        }
    ),
    FinetuneState.PAUSED: frozenset(
        {FinetuneState.VALIDATING_FILES, FinetuneState.QUEUED, FinetuneState.CANCELLED}
    ),
    FinetuneState.SUCCEEDED: frozenset(),
    FinetuneState.FAILED: frozenset(),
    FinetuneState.CANCELLED: frozenset(),
}

FINETUNE_TERMINAL = frozenset(
    state for state, following in FINETUNE_TRANSITIONS.items() if not following
)

Wanted = Literal["run", "pause", "cancel"]
Stage = Literal["validate", "train", "convert", "compare", "register"]
"""Steps in their order; a worker that takes a job over begins at the last one not finished."""
TuningMethod = Literal["lora", "qlora", "full"]
DataFormat = Literal["auto", "openai", "llava", "foodieqa", "batch"]
DeepSpeedStage = Literal["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
EventLevel = Literal["info", "warn", "error"]
EventType = Literal["message", "metrics"]


class Recipe(msgspec.Struct, frozen=True):
    """How to train. ``None`` is "auto": chosen from data, model and GPUs, and then shown.

    ``batch_size`` counts samples of one optimizer step over all GPUs; the learning rate is
    ``learning_rate`` itself or the method's usual one times ``learning_rate_multiplier``.
    """

    method: TuningMethod = "lora"
    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None
    learning_rate: float | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    lora_rank: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    lora_targets: tuple[Literal["llm", "vit"], ...] = ("llm",)
    max_length: int = 8192
    save_every: int | None = None
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = 3
    deepspeed: DeepSpeedStage = "zero2"
    gpus: int = 1
    gradient_checkpointing: bool | None = None


class DataSource(msgspec.Struct, frozen=True):
    """Which rows to learn from. Files are ids of the owner's uploads.

    Both may also be ids of finished batches. ``images`` says where rows without images of their own
    find them: an uploaded archive (tar or zip) or a folder below an image root.
    """

    training_file: str
    validation_file: str | None = None
    format: DataFormat = "auto"
    images: str | None = None
    max_bad_share: float = 0.05
    """The job fails before training if more than this share of the rows is unusable."""
    held_out_share: float = 0.1
    """Rows kept from training for the comparison, if there is no validation file."""
    max_held_out: int = 200
    max_compared: int = 64
    """Most held-out rows that base and tuned model are both asked about."""
    prompt: str | None = None
    """Of a caption job: what is asked about every image, in place of what the job asked."""
    keep_flagged: bool = False
    """Of a caption job: captions that its quality gate flagged are taken as well."""


class FinetuneSpec(msgspec.Struct, frozen=True):
    """What was asked for; never changes. ``job.json`` on disk. ``created_at`` is Unix seconds."""

    id: str
    owner: str
    model: str
    created_at: int
    seed: int
    data: DataSource
    recipe: Recipe = Recipe()
    suffix: str | None = None
    config_file: str | None = None
    """A whole xtuner configuration (an upload's id) in place of the recipe: code, so only for owners
    with that right."""
    metadata: dict[str, str] | None = None

    @property
    def tuned_name(self) -> str:
        """The model that comes of it: ``ft:<base>:<suffix>:<id>``, as OpenAI names them."""
        return f"ft:{self.model}:{self.suffix or ''}:{self.id.removeprefix('ftjob-')}"


class FinetuneError(msgspec.Struct, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class Progress(msgspec.Struct, frozen=True):
    """How far training is. ``step`` and ``total_steps`` are optimizer steps."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    learning_rate: float | None = None
    samples_per_s: float | None = None
    eta_s: float | None = None


class FinetuneCheckpoint(msgspec.Struct, frozen=True):
    """A checkpoint that was saved whole. ``path`` is below the job's folder."""

    step: int
    path: str
    created_at: int
    metrics: dict[str, float] = {}
    model: str | None = None
    """The model it was registered as, if somebody asked for that."""
    conversion: Literal["requested", "served", "failed"] | None = None
    """How far that is; why it failed is among the events."""


class FinetuneEvent(msgspec.Struct, frozen=True):
    """Something that happened. ``number`` counts from 1 within the job."""

    number: int
    created_at: int
    level: EventLevel
    type: EventType
    message: str
    data: dict[str, Any] = {}


class Finetune(FinetuneSpec, frozen=True, kw_only=True):
    """A fine-tune as it is now. Times are Unix seconds."""

    state: FinetuneState
    stage: Stage = "validate"
    wanted: Wanted = "run"
    waiting_for: str | None = None
    """Why it does not go on right now, for people: GPUs, a worker, disk."""
    token: int = 0
    attempts: int = 0
    """Workers or trainers that died with it since the last checkpoint that was new."""
    started_at: int | None = None
    finished_at: int | None = None
    resolved: dict[str, Any] = {}
    """The recipe with nothing left to choose, once it was resolved."""
    data_report: dict[str, Any] = {}
    """Counts of rows and images by fate, and the first bad rows."""
    progress: Progress = Progress()
    trained_tokens: int | None = None
    checkpoints: list[FinetuneCheckpoint] = []
    result_files: list[str] = []
    fine_tuned_model: str | None = None
    error: FinetuneError | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can change any more."""
        return self.state in FINETUNE_TERMINAL
