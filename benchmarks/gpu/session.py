"""One run: where things lie, what is asked for, and what was found."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.results import Results, figures
from benchmarks.gpu.scale import GpuScale
from benchmarks.gpu.work import WORKS
from benchmarks.report import Figure, table, write_json
from shared.errors import QueueUnavailable
from workers.inference.internvl.config import ModelConfig
from workers.inference.internvl.preprocess import tiling_of
from workers.inference.tiling import tile_count

_FAILURES = (
    AssertionError,
    TimeoutError,
    subprocess.SubprocessError,
    httpx.HTTPError,
    QueueUnavailable,
)
"""What a step that did not work raises; anything else is a fault of the benchmark."""


@dataclass
class Session:
    """Handed to every step. ``photos`` has the files of each kind of picture."""

    folder: Path
    rows: list[str]
    backends: list[str]
    gpus: list[str]
    changes: list[str]
    scale: GpuScale
    clock: Clock
    results: Results
    about: dict[str, str]
    out: Path
    checkpoint: Path | None = None
    model: ModelConfig | None = None
    photos: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def photo_folder(self) -> Path:
        """The root that requests name pictures under."""
        return self.folder / "photos"

    def works(self) -> list[str]:
        """The rows that are batches; chats and several GPUs need those of 448 px."""
        wanted = [row for row in WORKS if row in self.rows]
        needs_small = not {"chat", "chat-busy", "gpus"}.isdisjoint(self.rows)
        return ["448", *wanted] if needs_small and "448" not in wanted else wanted

    def photos_of(self, row: str) -> list[Path]:
        """The pictures of a row."""
        return self.photos[WORKS[row].kind.name]

    def tiles(self, row: str) -> int:
        """How many tiles a picture of a row becomes."""
        work = WORKS[row]
        if self.model is None:
            return 1
        return tile_count(work.kind.width, work.kind.height, tiling_of(self.model), work.detail)

    def note(self, text: str) -> None:
        """Say what was left out, now and in the results."""
        self.results.notes.append(text)
        self.clock.say(text)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Do one thing; what goes wrong is noted and the run goes on with the next."""
        self.clock.say(f"{name} ...")
        try:
            yield
        except _FAILURES as error:
            self.results.failed = True
            self.note(f"{name} FAILED: {type(error).__name__}: {error}")
        finally:
            self.save()

    def figures(self) -> list[Figure]:
        """The figures so far."""
        return figures(self.results, self.model)

    def save(self) -> None:
        """Write what there is so far."""
        write_json(self.out, self.figures(), self.about, measured=msgspec.to_builtins(self.results))

    def conclude(self) -> int:
        """Write everything, show the table, and give the exit status."""
        self.save()
        found = self.figures()
        print(table(found))
        print("\n" + ", ".join(f"{key} {value}" for key, value in self.about.items()))
        for note in self.results.notes:
            print(f"note: {note}")
        if self.results.dry:
            print(
                "DRY RUN with the echo engine: no model and no GPU; the speeds say nothing of them"
            )
        return int(self.results.failed or any(figure.passed is False for figure in found))
