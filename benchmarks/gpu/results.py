"""What was measured, and the figures that follow from it. Pure: no GPU, no clock."""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.gpu.flops import item_flops
from benchmarks.gpu.watch import Usage
from benchmarks.gpu.work import NEW_TOKENS, WORKS
from benchmarks.report import Figure, Target, milliseconds, percentile
from workers.inference.internvl.config import ModelConfig

Side = Literal["raw", "ours"]
State = Literal["idle", "busy"]

_TIMES_RAW = {
    ("turbomind", "448"): 2.6,
    ("pytorch", "448"): 2.6,
    ("turbomind", "1080p"): 4.5,
    ("pytorch", "1080p"): 2.4,
    ("turbomind", "12mp"): 10.0,
    ("pytorch", "12mp"): 10.0,
}
_OF_SMALL = 0.9
"""What 12 megapixels keep of the rate at 448 px: the GPU has the same work."""
_ADDED_MS = 15
_BUSY_TIMES = 3
_GPU_TIMES = {2: 1.9, 4: 3.7}


class Throughput(msgspec.Struct, frozen=True):
    """One timed batch. ``upload_s`` came before ``seconds``; raw has none."""

    backend: str
    row: str
    side: Side
    items: int
    seconds: float
    prompt_tokens: float
    tiles: int = 1
    upload_s: float = 0.0
    usage: Usage = msgspec.field(default_factory=Usage)

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.items / self.seconds


class FirstTokens(msgspec.Struct, frozen=True):
    """Chats one after the other. ``rate`` is what the batch got done meanwhile, in items/s."""

    backend: str
    side: Side
    state: State
    seconds: list[float]
    rate: float = 0.0


class Load(msgspec.Struct, frozen=True):
    """How long engines took from nothing to ready."""

    backend: str
    side: Side
    replicas: int
    seconds: float


class Scaling(msgspec.Struct, frozen=True):
    """The same work on ``gpus`` GPUs, with as many replicas on each."""

    backend: str
    gpus: int
    replicas: int
    batch: Throughput


class Results(msgspec.Struct):
    """Everything of one run; added to as it comes."""

    dry: bool
    tflops: float = 0.0
    throughputs: list[Throughput] = []
    first_tokens: list[FirstTokens] = []
    loads: list[Load] = []
    scalings: list[Scaling] = []
    faults: list[Figure] = []
    """What became of things that were broken on purpose."""
    notes: list[str] = []
    """What was left out or went wrong."""
    failed: bool = False
    """Whether something that was asked for could not be measured."""

    def incomplete(self, why: str) -> None:
        """Something is missing, and why."""
        self.failed = True
        self.notes.append(why)


def figures(results: Results, model: ModelConfig | None) -> list[Figure]:
    """All figures, in the order of the table. ``model`` is what the FLOPs are counted of."""
    entries: list[Load | Throughput | FirstTokens] = [
        *results.loads,
        *results.throughputs,
        *results.first_tokens,
    ]
    backends = dict.fromkeys(entry.backend for entry in entries)
    found: list[Figure] = []
    if results.tflops:
        found.append(Figure("gpu", "bf16 matrix product", results.tflops, "TFLOP/s"))
    for backend in backends:
        found += _loads(results, backend)
        for row in WORKS:
            found += _row(results, backend, row, model)
        found += _beside_small(results, backend)
        found += _chat(results, backend)
        found += _scaling(results, backend)
    if not results.dry:
        return found + results.faults
    # The echo engine has no model: no aim of speed applies to it.
    replace = msgspec.structs.replace
    return [replace(figure, benchmark="dry run, echo", target=None) for figure in found] + [
        replace(figure, benchmark=f"dry run, echo: {figure.benchmark}") for figure in results.faults
    ]


def best(results: Results, backend: str, row: str, side: Side) -> Throughput | None:
    """The fastest of a side's batches of a row."""
    fitting = _of(results, backend, row, side)
    return max(fitting, key=lambda entry: entry.rate, default=None)


def _of(results: Results, backend: str, row: str, side: Side) -> list[Throughput]:
    return [
        entry
        for entry in results.throughputs
        if (entry.backend, entry.row, entry.side) == (backend, row, side)
    ]


def _loads(results: Results, backend: str) -> list[Figure]:
    names = {"raw": "raw lmdeploy", "ours": "vlmq"}
    return [
        Figure(
            backend,
            f"load, {names[load.side]}",
            load.seconds,
            "s",
            None,
            f"{load.replicas} replicas" if load.replicas > 1 else "",
        )
        for load in results.loads
        if load.backend == backend
    ]


def _row(results: Results, backend: str, row: str, model: ModelConfig | None) -> list[Figure]:
    title = WORKS[row].title
    ours, raw = best(results, backend, row, "ours"), best(results, backend, row, "raw")
    found = []
    if raw is not None:
        rates = ", ".join(f"{entry.rate:,.1f}" for entry in _of(results, backend, row, "raw"))
        made_of = f"the better of {rates}; {raw.items} at once"
        found.append(Figure(backend, f"{title}: raw lmdeploy", raw.rate, "img/s", None, made_of))
    if ours is None:
        return found
    found.append(Figure(backend, f"{title}: vlmq", ours.rate, "img/s", None, _told(ours)))
    if raw is not None:
        aim = _TIMES_RAW.get((backend, row))
        target = Target(">=", aim) if aim else None
        found.append(Figure(backend, f"{title}: vlmq / raw", ours.rate / raw.rate, "times", target))
    with_upload = ours.items / (ours.seconds + ours.upload_s)
    made_of = f"upload {ours.upload_s:.1f} s"
    found.append(
        Figure(backend, f"{title}: vlmq, upload included", with_upload, "img/s", None, made_of)
    )
    if model is not None and results.tflops:
        found.append(_share_of_ceiling(ours, results.tflops, model))
    return found


def _share_of_ceiling(entry: Throughput, tflops: float, model: ModelConfig) -> Figure:
    each = item_flops(
        model,
        tiles=entry.tiles,
        prompt_tokens=round(entry.prompt_tokens),
        new_tokens=NEW_TOKENS,
    )
    ceiling = tflops * 1e12 / each
    return Figure(
        entry.backend,
        f"{WORKS[entry.row].title}: share of the bf16 ceiling",
        100 * entry.rate / ceiling,
        "%",
        None,
        f"{each / 1e12:.2f} TFLOP each, ceiling {ceiling:,.0f} img/s",
    )


def _told(entry: Throughput) -> str:
    usage = entry.usage
    parts = [f"{entry.items:,} in {entry.seconds:.1f} s"]
    if usage.gpu_percent is not None:
        parts.append(f"GPU {usage.gpu_percent:.0f} %, {usage.gpu_gib:.0f} GiB, {usage.watts:.0f} W")
    cores = {role: value for role, value in usage.cores.items() if value >= 0.05}
    if cores:
        parts.append("cores: " + ", ".join(f"{role} {value:.1f}" for role, value in cores.items()))
    return "; ".join(parts)


def _beside_small(results: Results, backend: str) -> list[Figure]:
    photo, small = (best(results, backend, row, "ours") for row in ("12mp", "448"))
    if photo is None or small is None:
        return []
    name = f"{WORKS['12mp'].title}: vlmq / its {WORKS['448'].title}"
    return [Figure(backend, name, photo.rate / small.rate, "times", Target(">=", _OF_SMALL))]


def _chat(results: Results, backend: str) -> list[Figure]:
    samples: dict[tuple[Side, State], FirstTokens] = {}
    for entry in results.first_tokens:
        if entry.backend == backend:
            key = entry.side, entry.state
            # Raw is measured twice: its better round counts.
            samples[key] = min(samples.get(key, entry), entry, key=_median)
    found = []
    for percent in (50, 95):
        times = {
            key: milliseconds(percentile(entry.seconds, percent)) for key, entry in samples.items()
        }
        for (side, state), value in times.items():
            name = "raw lmdeploy" if side == "raw" else f"vlmq, {state}"
            count = f"{len(samples[side, state].seconds)} chats"
            if state == "busy":
                count += f"; the batch meanwhile {samples[side, state].rate:,.0f} img/s"
            found.append(
                Figure(backend, f"first token p{percent}: {name}", value, "ms", None, count)
            )
        idle, raw, busy = (
            times.get(key) for key in (("ours", "idle"), ("raw", "idle"), ("ours", "busy"))
        )
        if idle is not None and raw is not None:
            name, target = f"first token p{percent}: added by vlmq", Target("<=", _ADDED_MS)
            found.append(Figure(backend, name, idle - raw, "ms", target))
        if idle is not None and busy is not None:
            name, target = f"first token p{percent}: busy / idle", Target("<=", _BUSY_TIMES)
            found.append(Figure(backend, name, busy / idle, "times", target))
    return found


def _median(entry: FirstTokens) -> float:
    return percentile(entry.seconds, 50)


def _scaling(results: Results, backend: str) -> list[Figure]:
    one = best(results, backend, "448", "ours")
    found = []
    for entry in results.scalings:
        if entry.backend != backend or one is None:
            continue
        aim = _GPU_TIMES.get(entry.gpus)
        found.append(
            Figure(
                backend,
                f"{WORKS['448'].title}: {entry.gpus} GPUs / one",
                entry.batch.rate / one.rate,
                "times",
                Target(">=", aim) if aim else None,
                f"{entry.batch.rate:,.1f} img/s with {entry.replicas} replicas; "
                + _told(entry.batch),
            )
        )
    return found
