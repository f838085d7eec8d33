"""What image sets are compared with: a pool of processes that reads, decodes and writes.

As img2dataset does it: as many processes as there are cores take shards of a thousand images, each
reads its images, decodes them in full, turns them by their EXIF tag, converts, scales, and writes its
shard. The answer is computed on the spot: no engine, no socket, no server. Nothing is checked
beside what Pillow checks: no bounds on pixels or bytes, no roots, no changed files; nothing is
fsynced, a process that dies takes the job with it, and there is no progress and no order. All of
that is in its favour.

With ``reencode`` the scaled image is encoded as a JPEG and written beside its line, which is what
img2dataset itself is for.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageOps

SHARD_ITEMS = 1000
_QUALITY = 95


class Job(NamedTuple):
    """What is done with every image."""

    source: Path
    """A folder or a tar."""
    output: Path
    """The folder of shards."""
    prompt: str
    side_px: int
    reencode: bool = False


class Named(NamedTuple):
    """An image: its name, and where in the tar it lies."""

    name: str
    offset: int = 0
    size: int = 0


class Spent(NamedTuple):
    """What a job took: seconds, and seconds of processor time of all its processes."""

    elapsed_s: float
    cpu_s: float


def run(job: Job, nice: int = 0) -> Spent:
    """Do the job with all cores. Listing the images is part of it.

    ``nice`` is the niceness of the pool's processes.
    """
    job.output.mkdir()
    start, cpu_start_s = time.perf_counter(), _cpu_s()
    found = _in_tar(job.source) if job.source.is_file() else _in_folder(job.source)
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), os.nice, (nice,)) as pool:
        for _ in pool.imap_unordered(partial(write_shard, job), enumerate(_shards(found))):
            pass
        elapsed_s = time.perf_counter() - start
        pool.close()
        pool.join()  # else what they took is not known
    return Spent(elapsed_s, _cpu_s() - cpu_start_s)


def _cpu_s() -> float:
    """The processor time of this process and of its children that have ended."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def write_shard(job: Job, numbered: tuple[int, list[Named]]) -> None:
    """Read, decode, scale and answer the images of one shard, and write it."""
    number, names = numbered
    with ExitStack() as opened:
        lines = opened.enter_context(open(job.output / f"{number:06d}.jsonl", "w"))
        archive: BinaryIO | None = None
        if job.source.is_file():
            archive = opened.enter_context(open(job.source, "rb"))
        encoded: tarfile.TarFile | None = None
        if job.reencode:
            encoded = opened.enter_context(tarfile.open(job.output / f"{number:06d}.tar", "w"))
        for named in names:
            try:
                picture = scaled(_read(job, named, archive), job.side_px)
            except OSError as error:
                lines.write(json.dumps({"name": named.name, "error": str(error)}) + "\n")
                continue
            pixels = picture.tobytes()
            lines.write(json.dumps(answer(named.name, job.prompt, len(pixels))) + "\n")
            if encoded is not None:
                _add(encoded, named.name, picture)


def _read(job: Job, named: Named, archive: BinaryIO | None) -> bytes:
    if archive is None:
        with open(job.source / named.name, "rb") as file:
            return file.read()
    archive.seek(named.offset)
    return archive.read(named.size)


def scaled(data: bytes, side_px: int) -> Image.Image:
    """The whole image, upright, in RGB, as one square. Raises: OSError if it is damaged."""
    picture: Image.Image = Image.open(io.BytesIO(data))
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return picture.resize((side_px, side_px), Image.Resampling.BICUBIC)


def answer(name: str, prompt: str, pixels: int) -> dict[str, object]:
    """What the echo engine says to the prompt, as a line."""
    words = len(prompt.split())
    return {"name": name, "caption": prompt, "tokens": words, "bytes": pixels}


def _in_folder(folder: Path) -> Iterator[Named]:
    """The files below the folder in the order of their names."""
    for where, folders, files in os.walk(folder):
        folders.sort()
        inside = os.path.relpath(where, folder)
        for file in sorted(files):
            yield Named(f"{inside}/{file}")


def _in_tar(path: Path) -> Iterator[Named]:
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # else every header of the archive stays in memory
            yield Named(member.name, member.offset_data, member.size)


def _shards(found: Iterator[Named]) -> Iterator[list[Named]]:
    shard: list[Named] = []
    for named in found:
        shard.append(named)
        if len(shard) == SHARD_ITEMS:
            yield shard
            shard = []
    if shard:
        yield shard


def _add(encoded: tarfile.TarFile, name: str, picture: Image.Image) -> None:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY)
    about = tarfile.TarInfo(name)
    about.size = file.tell()
    file.seek(0)
    encoded.addfile(about, file)
