"""Image sets: a folder and a tar of small JPEGs, beside plain Python doing the same.

One request over HTTP each. Images are listed while others are answered, verified, turned by their
EXIF tag and scaled to the model's tile in the consumers; the quality gate judges, every shard has
its provenance and is fsynced under a lease; and a client reads the results as they come. vlmq's time
runs from the request until the batch is ``completed``. Plain Python (:mod:`benchmarks.plain_python`)
does the same work on the same files in the same run.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import plain_python
from benchmarks.http_batches import TERMINAL, BatchClient
from benchmarks.items import MODEL
from benchmarks.memory import MIB, Peaks, peaks_of, redis_figures
from benchmarks.nodes import image_node
from benchmarks.pictures import is_broken, number_of, write_folder, write_tar
from benchmarks.plain_python import Job, Spent
from benchmarks.report import Figure, Target
from benchmarks.scale import Scale
from shared.settings import NodeSettings
from tests.running_node import RunningNode

TILE_PX = 224
LARGE_TILE_PX = 448
"""InternVL's."""
SMALL_TILE_PX = 64
"""Hardly any work per image: what is left is overhead."""
PROMPT = "Say in one short sentence what this picture shows."
_WARM_UP_IMAGES = 2_000
_LIMIT_S = 7200.0
_POLL_S = 0.25
_PAGE_LINES = 20_000
_RATIO = Target(">=", 0.7)


class Run(msgspec.Struct, frozen=True):
    """How one job of vlmq went. Times are seconds since the request; ``cpu_s`` is processor time.

    ``listed_s`` is when the listing had ended, ``done_then`` how many images had their line by then.
    """

    images: int
    elapsed_s: float
    cpu_s: float
    listed_s: float
    done_then: int

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.elapsed_s


def measure(scale: Scale) -> list[Figure]:
    """Run both over the tar and over the folder, and at other sizes of tiles over a smaller tar."""
    with _scratch() as folder:
        figures = _main_rows(folder, scale.images)
    with _scratch() as folder:
        tar, few = folder / "few.tar", scale.side_images
        write_tar(tar, few)
        for tile_px in (LARGE_TILE_PX, SMALL_TILE_PX):
            with _node(folder, tile_px) as (node, client):
                run = caption(node, client, tar, few, folder)
            plain = run_plain(tar, few, folder, tile_px)
            what = f"tar of {few:,}, tiles of {tile_px} px"
            figures += _beside(what, run, plain, _RATIO if tile_px == LARGE_TILE_PX else None)
        encoding = run_plain(tar, few, folder, TILE_PX, reencode=True)
        name = f"tar of {few:,}: plain Python, JPEGs written, too"
        figures.append(_rate(name, few, encoding))
    return figures


def _main_rows(folder: Path, images: int) -> list[Figure]:
    figures = []
    with _node(folder, TILE_PX) as (node, client):
        for kind, write in (("tar", write_tar), ("folder", write_folder)):
            source = folder / f"pictures.{kind}"
            _note(f"writing a {kind}")
            write(source, images)
            os.sync()  # what is still to be written must not slow down whoever comes first
            _note("vlmq")
            run = caption(node, client, source, images, folder)
            _note(f"{run.rate:,.0f}/s; plain Python")
            plain = run_plain(source, images, folder, TILE_PX)
            _note(f"{images / plain.elapsed_s:,.0f}/s;")
            figures += _beside(f"{kind} of {images:,}", run, plain, _RATIO)
            figures += _listing(f"{kind} of {images:,}", run)
            _delete(source)
        return figures + _memory(peaks_of(node), images)


# --- vlmq -------------------------------------------------------------------------------------


def caption(node: RunningNode, client: BatchClient, source: Path, images: int, folder: Path) -> Run:
    """Caption a set, read its results meanwhile, and check them.

    Raises: AssertionError if anything is missing, twice or wrong; TimeoutError.
    """
    output = folder / "results.jsonl"
    start, cpu_start_s = time.perf_counter(), _cpu_s(node)
    batch_id = client.caption(source, MODEL, PROMPT)
    listed: tuple[float, int] | None = None
    with open(output, "wb") as stream:
        after = "0"
        while True:
            batch = client.batch(batch_id)
            elapsed_s, counts = time.perf_counter() - start, batch["request_counts"]
            if listed is None and batch["vlmq"]["listing"]["complete"]:
                listed = (elapsed_s, counts["completed"] + counts["failed"])
            if batch["status"] in TERMINAL:
                break
            if elapsed_s > _LIMIT_S:
                raise TimeoutError(f"{batch_id} is {batch['status']} after {_LIMIT_S:g} s")
            after = _read(client, batch_id, after, stream)
            time.sleep(_POLL_S)
        cpu_s = _cpu_s(node) - cpu_start_s
        while (following := _read(client, batch_id, after, stream)) != after:
            after = following
    _check_batch(client, batch, images)
    with open(output, "rb") as lines:
        check_lines(lines, images)
    output.unlink()
    assert listed is not None, "a completed batch was listed"
    return Run(images, elapsed_s, cpu_s, *listed)


def _cpu_s(node: RunningNode) -> float:
    """The processor time of a node's processes so far; none of them comes or goes meanwhile."""
    ticks = 0
    for pid in node.pids():
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(status[11]) + int(status[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _read(client: BatchClient, batch_id: str, after: str, stream: Any) -> str:
    page = client.results(batch_id, after, _PAGE_LINES)
    stream.write(page.lines)
    return page.next_after


def _check_batch(client: BatchClient, batch: dict[str, Any], images: int) -> None:
    broken = sum(map(is_broken, range(images)))
    assert batch["status"] == "completed", f"the batch ended {batch['status']}: {batch['errors']}"
    counts = {"total": images, "completed": images - broken, "failed": broken}
    assert batch["request_counts"] == counts, f"{batch['request_counts']} in place of {counts}"
    assert batch["vlmq"]["quality"]["review"]["captions"] == 0, "a good answer did not pass"
    assert client.provenance(batch["id"]), "the shards do not say what they came of"


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Error(msgspec.Struct):
    code: str


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response


_decoder = msgspec.json.Decoder(_Line)


def check_lines(lines: Iterable[bytes], images: int) -> None:
    """Raise AssertionError unless every image has one line, with its answer or its right error."""
    seen = _Seen(images)
    for text in lines:
        line = _decoder.decode(text)
        body = line.response.body
        said = body.error.code if body.error else body.choices[0].message.content
        seen.add(line.custom_id, said, PROMPT, "image_truncated")
    seen.check()


class _Seen:
    """Which images had their line."""

    def __init__(self, images: int) -> None:
        self._seen = bytearray(images)

    def add(self, name: str, said: str, answer: str, error: str) -> None:
        """Note what was said of an image; it must be the answer, or the error if it is broken."""
        number = number_of(name)
        assert not self._seen[number], f"{name} has two lines"
        self._seen[number] = 1
        expected = error if is_broken(number) else answer
        assert said == expected, f"{name}: {said!r} in place of {expected!r}"

    def check(self) -> None:
        """Nothing is missing."""
        missing = self._seen.count(0)
        assert not missing, f"{missing} of {len(self._seen)} images have no line"


# --- plain Python -----------------------------------------------------------------------------


def run_plain(
    source: Path, images: int, folder: Path, tile_px: int, *, reencode: bool = False
) -> Spent:
    """Have plain Python do it, as nice as vlmq's consumers are, and check its lines."""
    output = folder / "plain"
    job = Job(source, output, PROMPT, tile_px, reencode=reencode)
    spent = plain_python.run(job, NodeSettings().batch_nice)
    check_shards(output, images, tile_px)
    _delete(output)
    return spent


def check_shards(folder: Path, images: int, tile_px: int) -> None:
    """Raise AssertionError unless every image has one line in the shards, and the right one."""
    seen = _Seen(images)
    for shard in folder.glob("*.jsonl"):
        for text in shard.read_bytes().splitlines():
            line = msgspec.json.decode(text)
            assert line.get("bytes", 3 * tile_px**2) == 3 * tile_px**2, f"{line} has other pixels"
            said = "truncated" if "truncated" in line.get("error", "") else line.get("caption", "")
            seen.add(line["name"], said, PROMPT, "truncated")
    seen.check()


# --- figures ----------------------------------------------------------------------------------


def _beside(what: str, ours: Run, plain: Spent, target: Target | None) -> list[Figure]:
    ratio, work = plain.elapsed_s / ours.elapsed_s, plain.cpu_s / ours.cpu_s
    name = f"{what}: vlmq / plain Python"
    return [
        _rate(f"{what}: vlmq", ours.images, ours),
        _rate(f"{what}: plain Python", ours.images, plain),
        Figure("image sets", name, ratio, "times", target, f"by processor time {work:.2f}"),
    ]


def _rate(name: str, images: int, spent: Run | Spent) -> Figure:
    each = f"{1e6 * spent.cpu_s / images:,.0f} us of processor time each"
    return Figure("image sets", name, images / spent.elapsed_s, "items/s", None, each)


def _listing(what: str, run: Run) -> list[Figure]:
    rate, share = run.images / run.listed_s, 100 * run.listed_s / run.elapsed_s
    made_of = (
        f"complete after {run.listed_s:.1f} of {run.elapsed_s:.1f} s, {run.done_then:,} answered"
    )
    return [
        Figure("image sets", f"{what}: listed meanwhile", rate, "entries/s", None, made_of),
        Figure("image sets", f"{what}: time until all is listed", share, "%", Target("<", 100)),
    ]


def _memory(peaks: Peaks, images: int) -> list[Figure]:
    after = f"after two sets of {images:,}"
    figures = [
        Figure("image sets", f"peak memory of {role}", peak / MIB, "MiB", None, after)
        for role, peak in sorted(peaks.by_role.items())
    ]
    return figures + redis_figures("image sets", peaks, made_of=after)


# --- scratch ----------------------------------------------------------------------------------


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        yield Path(name)


@contextmanager
def _node(folder: Path, tile_px: int) -> Iterator[tuple[RunningNode, BatchClient]]:
    """A node that has captioned a small set, so that every process has imported what it needs."""
    with image_node(folder, tile_px) as node, BatchClient(node.base_url) as client:
        tar = folder / "warm-up.tar"
        write_tar(tar, _WARM_UP_IMAGES)
        caption(node, client, tar, _WARM_UP_IMAGES, folder)
        yield node, client


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _note(text: str) -> None:
    print(text, file=sys.stderr, end=" ", flush=True)
