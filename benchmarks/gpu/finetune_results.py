"""What was measured of fine-tunes, and the figures that follow from it. Pure: no GPU, no clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.gpu.training_process import Iteration, Observed
from benchmarks.report import Figure, Target

STOCK, OURS, CACHED, CURVE, SEVERAL = "stock", "ours", "cached", "curve", "gpus"
_TIMES_STOCK = 2.8
_TIMES_ONE_GPU = 1.85
LOSS_TOLERANCE = 0.02
"""Most that a loss of ours may be from stock's at the same iteration; losses begin at about 11.4."""
_EPOCHS = 10
"""The tutorial's."""
_MIB = 1024**2


class Training(msgspec.Struct, frozen=True):
    """One training. ``warm_up`` iterations come before those whose time counts."""

    name: str
    gpus: int
    micro_batch: int
    accumulation: int
    warm_up: int
    observed: Observed
    cached_s: float | None = None
    """Of the start-up: computing features of the frozen ViT, which every epoch then reads."""
    settings: dict[str, str] = {}
    """What was chosen or asked for, for people."""

    @property
    def timed(self) -> Sequence[Iteration]:
        """The iterations whose time counts."""
        return self.observed.iterations[self.warm_up :]

    @property
    def rate(self) -> float:
        """Samples per second over all GPUs."""
        seconds = sum(iteration.time for iteration in self.timed)
        return self.micro_batch * self.gpus * len(self.timed) / seconds

    def rate_over(self, epochs: int) -> float:
        """Samples per second over so many epochs, with the time that the cache took."""
        samples = epochs * self.micro_batch * self.gpus * len(self.observed.iterations)
        return samples / ((self.cached_s or 0.0) + samples / self.rate)

    @property
    def losses(self) -> list[float]:
        """Of every iteration."""
        return [iteration.loss for iteration in self.observed.iterations]

    @property
    def peak_gib(self) -> float:
        """The most that tensors took on the first GPU."""
        return max(iteration.memory for iteration in self.observed.iterations) / 1024


class Conversion(msgspec.Struct, frozen=True):
    """From a checkpoint to a folder in the official format."""

    name: str
    seconds: float
    size_bytes: int


class Findings(msgspec.Struct):
    """Everything of one run; added to as it comes."""

    dry: bool
    tflops: float = 0.0
    trainings: list[Training] = []
    conversions: list[Conversion] = []
    notes: list[str] = []
    failed: bool = False

    def training(self, name: str) -> Training | None:
        """The training of that name."""
        return next((one for one in self.trainings if one.name == name), None)


def figures(findings: Findings) -> list[Figure]:
    """All figures so far; targets only where the numbers are a GPU's."""
    out: list[Figure] = []
    for training in findings.trainings:
        out += _of_training(training)
    stock = findings.training(STOCK)
    for training in findings.trainings:
        if stock is not None and training.gpus == 1 and training.name not in (STOCK, CURVE):
            target = Target(">=", _TIMES_STOCK) if training.name == OURS else None
            out.append(_ratio(f"{training.name} / stock", training, stock, target))
        if training.cached_s is not None and stock is not None:
            ratio = training.rate_over(_EPOCHS) / stock.rate
            made_of = f"{training.cached_s:.1f} s for the cache counted in"
            out.append(_figure(f"{training.name} / stock, {_EPOCHS} epochs", ratio, "x", made_of))
    out += _of_gpus(findings)
    curve = findings.training(CURVE)
    if stock is not None and curve is not None:
        out += _of_losses(stock, curve)
    for conversion in findings.conversions:
        out.append(_figure(f"{conversion.name}: conversion", conversion.seconds, "s"))
        out.append(_figure(f"{conversion.name}: model", conversion.size_bytes / 1024**3, "GiB"))
    if findings.dry:
        return [msgspec.structs.replace(figure, target=None) for figure in out]
    return out


def _of_training(training: Training) -> list[Figure]:
    observed, name = training.observed, training.name
    what = f"{training.micro_batch} x {training.accumulation}"
    if training.gpus > 1:
        what += f" on {training.gpus} GPUs"
    waited = sum(one.data_time for one in training.timed) / sum(one.time for one in training.timed)
    out = [
        _figure(
            f"{name}: samples",
            training.rate,
            "1/s",
            f"batches of {what}, {len(training.timed)} iterations, {waited:.0%} waiting for data",
        ),
        _figure(f"{name}: start-up", observed.startup_s, "s"),
        _figure(f"{name}: checkpoint", observed.checkpoint_s, "s"),
        _figure(f"{name}: checkpoint size", observed.checkpoint_bytes / _MIB, "MiB"),
    ]
    if training.peak_gib:
        out.append(_figure(f"{name}: peak memory", training.peak_gib, "GiB", "of tensors"))
    if observed.used_gib is not None:
        out.append(_figure(f"{name}: GPU memory", observed.used_gib, "GiB", "as nvidia-smi says"))
    return out


def _of_gpus(findings: Findings) -> list[Figure]:
    one = findings.training(OURS)
    several = [training for training in findings.trainings if training.gpus > 1]
    if one is None:
        return []
    return [
        _ratio(
            f"{training.name}: {training.gpus} GPUs / one",
            training,
            one,
            Target(">=", _TIMES_ONE_GPU)
            if (training.name, training.gpus) == (SEVERAL, 2)
            else None,
        )
        for training in several
    ]


def _of_losses(stock: Training, ours: Training) -> list[Figure]:
    pairs = list(zip(stock.losses, ours.losses, strict=False))
    apart = [abs(left - right) for left, right in pairs]
    fell = pairs[0][0] - pairs[-1][0]
    return [
        _figure(
            "losses apart from stock's",
            1000 * max(apart),
            "/1000",
            f"the most of {len(pairs)}; stock went from {pairs[0][0]:.3f} to {pairs[-1][0]:.3f}",
            Target("<=", 1000 * LOSS_TOLERANCE),
        ),
        # Equal curves say nothing if nothing was learnt.
        _figure("stock's loss fell by", 1000 * fell, "/1000", "", Target(">=", 100)),
    ]


def _ratio(name: str, above: Training, below: Training, target: Target | None) -> Figure:
    made_of = f"{above.rate:.2f} / {below.rate:.2f} samples/s"
    return _figure(name, above.rate / below.rate, "x", made_of, target)


def _figure(
    name: str, value: float, unit: str, made_of: str = "", target: Target | None = None
) -> Figure:
    return Figure("fine-tune", name, value, unit, target, made_of)
