"""How many replicas a served model gets, on which GPUs, and how much of their memory each may use.

Pure: it is told what the machine has and decides. A replica's memory is a share (0 to 1) of each of
its GPUs' total memory, kept by configuration: nothing but the engine itself enforces it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.settings import NodeSettings, ServeSettings

PYTORCH_REPLICAS_PER_GPU = 4
"""lmdeploy's PyTorch engine is bound by Python: one process gave 61 images/s on one GPU, two 104,
four 166, eight 157."""
CORES_PER_REPLICA = 3
DEFAULT_RUNNING = 32
TURBOMIND_RUNNING = 256
PYTORCH_RUNNING = 128
MIN_BATCH_PROCESSES = 2
MAX_BATCH_PROCESSES = 48
WORKING_BYTES = 6 * 1024**3
"""What a replica needs beside its weights for keys, values and activations."""


@dataclass(frozen=True)
class Machine:
    """What counts for placing: processor cores, and each known GPU's total memory in bytes."""

    cores: int
    gpu_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Seat:
    """Where one replica runs. Without ``gpus`` it sees what the node sees, and has no share."""

    number: int
    gpus: tuple[str, ...] = ()
    share: float | None = None

    @property
    def visible(self) -> str:
        """Its CUDA_VISIBLE_DEVICES."""
        return ",".join(self.gpus)


@dataclass(frozen=True)
class Placement:
    """One served model on this machine."""

    entry: ServeSettings
    seats: tuple[Seat, ...]

    @property
    def shares(self) -> dict[str, float]:
        """How much of each GPU all replicas together may use."""
        return dict.fromkeys(gpus_of(self.entry), self.entry.gpu_share)


def place(
    serve: Iterable[ServeSettings], weights: Mapping[str, int | None], machine: Machine
) -> list[Placement]:
    """Seats for every entry of ``node.serve``; ``weights`` are bytes on disk, None if unknown.

    Raises: ConfigurationError naming the models and the GPU when what is always loaded does not
    fit together, or when a model could never be loaded.
    """
    entries = list(serve)
    twice = [name for name, count in Counter(e.model for e in entries).items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"node.serve names the model '{twice[0]}' twice; give one entry all its gpus"
        )
    _require_room(entries)
    slots = sum(len(entry.gpus) for entry in entries)
    return [
        Placement(entry, seats(entry, count_replicas(entry, weights[entry.model], machine, slots)))
        for entry in entries
    ]


def count_replicas(entry: ServeSettings, weights: int | None, machine: Machine, slots: int) -> int:
    """The replicas of an entry: what it says, or for ``auto`` what its engine wants and has room for.

    ``slots`` is how many lists of GPUs all entries name together; they divide the cores.
    """
    if entry.replicas != "auto":
        return entry.replicas
    per_slot = 1
    if _wants_many(entry):
        per_slot = min(
            PYTORCH_REPLICAS_PER_GPU,
            _fitting(entry, weights, machine),
            machine.cores // (CORES_PER_REPLICA * max(1, slots)),
        )
    return max(1, per_slot) * max(1, len(entry.gpus))


def place_like(entry: ServeSettings, root: Placement | None) -> Placement:
    """Seats for a model that came while the node runs: as many as ``root`` has, else as it says."""
    if root is not None:
        return Placement(entry, seats(entry, len(root.seats)))
    return Placement(entry, seats(entry, 1 if entry.replicas == "auto" else entry.replicas))


def count_batch_processes(node: NodeSettings, serve: Iterable[ServeSettings], cores: int) -> int:
    """How many processes work on batches: as configured, or for ``auto`` by what they have to feed.

    A GPU is faster than many cores are at decoding photos, so beside one all of them decode, at a
    niceness that lets everything else go first. A process that has decoded its chunk waits for the
    last answers, so there are more of them than cores: 16 cores decoded photos of 12 megapixels 19 %
    faster with 24 processes than with 20. An engine that computes on the processor itself needs the
    cores more.
    """
    if node.batch_processes != "auto":
        return node.batch_processes
    if not any(entry.gpus or entry.engine == "lmdeploy" for entry in serve):
        return MIN_BATCH_PROCESSES
    return max(MIN_BATCH_PROCESSES, min(MAX_BATCH_PROCESSES, cores * 3 // 2))


def count_running(entry: ServeSettings) -> int:
    """How many requests one replica works on at once: as configured, or what suits its engine."""
    if entry.max_running is not None:
        return entry.max_running
    if entry.engine != "lmdeploy":
        return DEFAULT_RUNNING
    return PYTORCH_RUNNING if _wants_many(entry) else TURBOMIND_RUNNING


def seats(entry: ServeSettings, replicas: int) -> tuple[Seat, ...]:
    """Replica N on ``gpus[N % len(gpus)]``; those on one GPU divide the entry's share equally."""
    if not entry.gpus:
        return tuple(Seat(number) for number in range(replicas))
    chosen = [split_gpus(entry.gpus[number % len(entry.gpus)]) for number in range(replicas)]
    on_gpu = Counter(gpu for gpus in chosen for gpu in gpus)
    return tuple(
        Seat(number, gpus, entry.gpu_share / max(on_gpu[gpu] for gpu in gpus))
        for number, gpus in enumerate(chosen)
    )


def split_gpus(value: str) -> tuple[str, ...]:
    """``"0,1"`` as ``("0", "1")``."""
    return tuple(part.strip() for part in value.split(",") if part.strip())


def gpus_of(entry: ServeSettings) -> tuple[str, ...]:
    """Every GPU that an entry uses, once."""
    return tuple(dict.fromkeys(gpu for value in entry.gpus for gpu in split_gpus(value)))


def takes_any_gpu(entry: ServeSettings) -> bool:
    """Whether its engines use GPUs that it does not name: those that the node sees."""
    device = str(entry.options.get("device", ""))
    return not entry.gpus and (entry.engine == "lmdeploy" or device.startswith("cuda"))


def _wants_many(entry: ServeSettings) -> bool:
    # Which backend "auto" becomes is known to the engine only; one replica is never wrong.
    return entry.engine == "lmdeploy" and entry.options.get("backend") == "pytorch"


def _fitting(entry: ServeSettings, weights: int | None, machine: Machine) -> int:
    """How many replicas the smallest of the entry's GPUs has memory for; 1 if that is not known."""
    gpus = gpus_of(entry)
    if weights is None or not gpus or any(gpu not in machine.gpu_bytes for gpu in gpus):
        return 1
    room = entry.gpu_share * min(machine.gpu_bytes[gpu] for gpu in gpus)
    parts = max(len(split_gpus(value)) for value in entry.gpus)
    return int(room // (weights / parts + WORKING_BYTES))


def _require_room(entries: list[ServeSettings]) -> None:
    always = [entry for entry in entries if entry.load == "always"]
    for gpu in dict.fromkeys(gpu for entry in entries for gpu in gpus_of(entry)):
        _require_fit(gpu, [entry for entry in always if gpu in gpus_of(entry)], always=True)
        for entry in entries:
            if entry.load == "on_demand" and gpu in gpus_of(entry):
                beside = [other for other in always if gpu in gpus_of(other)]
                _require_fit(gpu, [*beside, entry], always=False)


def _require_fit(gpu: str, entries: list[ServeSettings], *, always: bool) -> None:
    total = sum(entry.gpu_share for entry in entries)
    if total <= 1 + 1e-6:
        return
    names = ", ".join(f"{entry.model} ({entry.gpu_share:g})" for entry in entries)
    if always:
        raise ConfigurationError(
            f"the models that are always loaded do not fit on GPU {gpu} together: {names} is "
            f'{total:g} of it; give them smaller memory_share, or some load = "on_demand"'
        )
    raise ConfigurationError(
        f"the model {entries[-1].model} could never be loaded on GPU {gpu} beside those that "
        f"always are: {names} is {total:g} of it; give them smaller memory_share"
    )
