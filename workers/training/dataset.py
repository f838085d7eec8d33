"""From what an owner uploaded to the ``data`` folder of a fine-tune, in which nothing is unverified.

    data/train.json      rows to learn, as xtuner reads LLaVA's format
    data/held_out.json   rows kept for the comparison, in the same form
    data/images/         every image once, upright, under the digest of its content
    data/report.json     a DataReport

The folder appears whole or not at all: it is made under another name beside and renamed. Rows are
read once and kept, with what is found out about them, in a scratch database; then images are got and
decoded in full; then rows are judged, split and written. Memory does not grow with the dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from shared.errors import (
    DatasetInvalid,
    ImageForbidden,
    RowUnusable,
    StorageFailed,
    TooFewRows,
    TooManyBadRows,
    TooManyRows,
)
from shared.finetunes import DataFormat, DataSource
from shared.settings import ImageSettings
from shared.storage import (
    TEMPORARY_SUFFIX,
    remove_tree,
    require_space,
    storage_errors,
    sync_folder,
    write_json,
)
from workers.training.batch_rows import BatchFiles, read_batch
from workers.training.caption_rows import CaptionBatch
from workers.training.data_report import DataReport, EntryTally, Side, Spread, Tally
from workers.training.picture_sources import (
    LoadImage,
    PictureCollector,
    relative_address,
    stands_alone,
)
from workers.training.pictures import PictureFolder
from workers.training.row_files import RawRow, read_rows
from workers.training.row_formats import PARSERS, detect
from workers.training.row_lengths import RowLengths
from workers.training.row_table import GoodRow, RowTable, StoredRow
from workers.training.rows import IMAGE_TAG, Row
from workers.training.split import choose, target

DATA = "data"
TRAIN = "train.json"
HELD_OUT = "held_out.json"
IMAGES = "images"
REPORT = "report.json"

MIN_TRAIN_ROWS = 4
"""With fewer there is nothing to learn from, and most likely a mistake."""
_ROWS_BETWEEN_CHECKS = 256

KeepGoing = Callable[[], None]
"""Called often; raises to stop."""

_ParsedRows = Iterator[tuple[RawRow, Row | RowUnusable]]

GivenRows = Path | BatchFiles | CaptionBatch
"""A file of rows, the files of a finished batch, or a finished caption job."""


@dataclass(frozen=True)
class Inputs:
    """The opened sources: paths on this machine.

    Rows name members of ``archive``, or files below ``folder``, an absolute path without links
    that the caller has found to be below an image root. ``load_image`` gets everything else.
    """

    training: GivenRows
    load_image: LoadImage
    validation: GivenRows | None = None
    archive: Path | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Limits:
    """What is accepted."""

    images: ImageSettings
    max_rows: int
    max_row_bytes: int
    min_free_bytes: int = 0


def prepare(
    job_folder: Path,
    source: DataSource,
    inputs: Inputs,
    *,
    seed: int,
    max_length: int,
    lengths: RowLengths,
    limits: Limits,
    keep_going: KeepGoing,
) -> DataReport:
    """Make ``job_folder/data`` and say what is in it; if it is there already, only say so.

    What an earlier run left behind half made is deleted. ``keep_going`` raises to stop.
    Raises: DatasetInvalid or one of its kinds, with ``report``; StorageFull, StorageFailed.
    """
    final = job_folder / DATA
    ready = read_report(job_folder)
    if ready is not None:
        return ready
    with storage_errors(job_folder):
        # Each is renamed first: if its maker lives, it fails at its next step instead of going on
        # in half a folder. What is left of one that was being deleted matches, too.
        for stale in job_folder.glob(f".*{DATA}.*{TEMPORARY_SUFFIX}"):
            remove_tree(stale)
        scratch = job_folder / f".{DATA}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        scratch.mkdir(mode=0o700)
    try:
        work = _Preparation(scratch, source, inputs, seed, max_length, lengths, limits, keep_going)
        report = work.run()
        return _publish(scratch, final, report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_report(job_folder: Path) -> DataReport | None:
    """The report of a prepared dataset, or ``None`` if there is none. Raises: StorageFailed."""
    path = job_folder / DATA / REPORT
    try:
        return msgspec.json.decode(path.read_bytes(), type=DataReport)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise StorageFailed(f"{path}: {error}") from error


def _publish(scratch: Path, final: Path, report: DataReport) -> DataReport:
    write_json(scratch / REPORT, report)
    # Images were written without, since a million syncs take hours; all of them now, before the
    # name under which they are believed to be whole.
    os.sync()
    with storage_errors(final):
        try:
            os.rename(scratch, final)
        except OSError:
            there = read_report(final.parent)
            if there is not None:
                return there  # another worker was faster
            if not final.exists():
                raise
            remove_tree(final)
            os.rename(scratch, final)
        sync_folder(final.parent)
    return report


class _Preparation:
    """One run, in its scratch folder."""

    def __init__(
        self,
        scratch: Path,
        source: DataSource,
        inputs: Inputs,
        seed: int,
        max_length: int,
        lengths: RowLengths,
        limits: Limits,
        keep_going: KeepGoing,
    ) -> None:
        self._scratch = scratch
        self._source = source
        self._inputs = inputs
        self._seed = seed
        self._max_length = max_length
        self._lengths = lengths
        self._limits = limits
        self._keep_going = keep_going
        self._tally = Tally()
        self._refused = EntryTally()
        self._format: DataFormat = source.format
        self._steps = 0
        self._unlearned = 0
        """Rows that are dropped although nothing is wrong with them."""

    def run(self) -> DataReport:
        database = self._scratch / "rows.db"
        table = RowTable(database)
        try:
            self._collect(table)
            self._judge(table)
            table.hold_out(self._split(table))
            report = self._write(table)
        finally:
            table.close()
        with storage_errors(database):
            database.unlink()
        return report

    # --- rows and images in --------------------------------------------------------------------

    def _collect(self, table: RowTable) -> None:
        images = self._scratch / IMAGES
        with storage_errors(images):
            images.mkdir(mode=0o700)
        pictures = PictureFolder(images, self._limits.images)
        with PictureCollector(
            table, pictures, self._limits.images, self._inputs.load_image, self._step
        ) as collector:
            self._format, rows = self._rows_of(self._inputs.training, "training", collector)
            self._take(table, collector, "training", rows)
            if self._inputs.validation is not None:
                _, rows = self._rows_of(self._inputs.validation, "validation", collector)
                self._take(table, collector, "validation", rows)
            collector.take_all(self._inputs.archive, self._inputs.folder, self._refused)

    def _rows_of(
        self, given: GivenRows, side: Side, collector: PictureCollector
    ) -> tuple[DataFormat, _ParsedRows]:
        param = f"{side}_file"
        if isinstance(given, CaptionBatch):
            return "batch", given.rows(collector.take)
        if isinstance(given, BatchFiles):
            answers = self._scratch / "answers.db"
            rows = read_batch(given, answers, self._limits.max_row_bytes, param)
            return "batch", self._addressed_rows(rows, collector)
        named = self._source.format
        if named == "batch" and side == "validation":
            named = "auto"
        if named == "batch":
            raise DatasetInvalid(
                f"format is 'batch', so {param} must be the id of a finished batch", param=param
            )
        found, rows = self._parsed(given, named, param)
        return found, self._addressed_rows(rows, collector)

    def _parsed(self, path: Path, named: DataFormat, param: str) -> tuple[DataFormat, _ParsedRows]:
        found = named
        if named == "auto":
            rows = read_rows(path, self._limits.max_row_bytes, param)
            found = detect((raw.text for raw in rows), param)
        return found, self._parse(path, found, param)

    def _parse(self, path: Path, format_: DataFormat, param: str) -> _ParsedRows:
        parse = PARSERS[format_]
        for raw in read_rows(path, self._limits.max_row_bytes, param):
            try:
                yield raw, parse(raw.text)
            except RowUnusable as error:
                yield raw, error

    def _take(
        self, table: RowTable, collector: PictureCollector, side: Side, rows: _ParsedRows
    ) -> None:
        for raw, row in rows:
            self._step()
            self._tally.rows += 1
            if self._tally.rows > self._limits.max_rows:
                raise TooManyRows(
                    f"the dataset has more than the {self._limits.max_rows:,} rows that this "
                    "server accepts (finetune.max_rows); take a part of it",
                    param=f"{side}_file",
                )
            if isinstance(row, RowUnusable):
                self._tally.drop(side, raw.number, raw.line, row)
                self._unlearned += not row.is_fault
            else:
                table.add_row(side, raw.number, raw.line, row)

    def _addressed_rows(self, rows: _ParsedRows, collector: PictureCollector) -> _ParsedRows:
        for raw, row in rows:
            yield raw, self._addressed(row, collector)

    def _addressed(self, row: Row | RowUnusable, collector: PictureCollector) -> Row | RowUnusable:
        """The row with its image under a name that is short, and one for one file."""
        if isinstance(row, RowUnusable) or row.image is None:
            return row
        address = row.image
        if address[:5].lower() == "data:":
            address = collector.take_inline(address)
        elif self._inputs.archive is not None and not stands_alone(address):
            try:
                address = relative_address(address)
            except ImageForbidden as error:
                return RowUnusable(error.message, param="image", reason=error.code)
        return msgspec.structs.replace(row, image=address)

    # --- judging -------------------------------------------------------------------------------

    def _judge(self, table: RowTable) -> None:
        for stored in table.rows():
            self._step()
            try:
                self._judge_row(table, stored)
            except RowUnusable as error:
                self._tally.drop(stored.side, stored.number, stored.line, error)
        for number, line in table.drop_shared():
            self._unlearned += 1
            problem = RowUnusable(
                "a row of the validation file shows the same image",
                param="image",
                reason="in_validation_file",
            )
            self._tally.drop("training", number, line, problem)
        self._require_enough(table)

    def _judge_row(self, table: RowTable, stored: StoredRow) -> None:
        if stored.problem is not None:
            reason, message = stored.problem
            raise RowUnusable(message, param="image", reason=reason)
        picture = stored.picture
        if stored.row.image is not None and picture is None:
            raise RowUnusable("the image was not found", param="image", reason="image_not_found")
        size = None if picture is None else (picture.width, picture.height)
        tokens = self._lengths.tokens(stored.row, size)
        if tokens > self._max_length:
            counted = "" if self._lengths.is_exact else "up to "
            raise RowUnusable(
                f"the row takes {counted}{tokens:,} tokens with its image, more than max_length, "
                f"{self._max_length:,}; shorten it or raise max_length",
                reason="too_long",
            )
        self._tally.notes.update(stored.row.notes)
        table.keep(stored, _split_key(stored), tokens)

    def _require_enough(self, table: RowTable) -> None:
        rows, bad = self._tally.rows, self._tally.bad - self._unlearned
        if not rows:
            raise TooFewRows("the file holds no rows", param="training_file")
        usable = table.count("training")
        if rows and bad / rows > self._source.max_bad_share:
            raise TooManyBadRows(
                f"{bad:,} of {rows:,} rows cannot be used, more than max_bad_share allows "
                f"({self._source.max_bad_share:.1%}): {self._reasons()}",
                param="training_file",
                report=self._failed_report(table),
            )
        if usable < MIN_TRAIN_ROWS:
            raise TooFewRows(
                f"{usable} rows can be trained on, and at least {MIN_TRAIN_ROWS} are needed"
                + (f": {self._reasons()}" if self._tally.bad else ""),
                param="training_file",
                report=self._failed_report(table),
            )
        if self._inputs.validation is not None and not table.count("validation"):
            raise TooFewRows(
                "no row of the validation file can be used"
                + (f": {self._reasons()}" if self._tally.bad else ""),
                param="validation_file",
                report=self._failed_report(table),
            )

    def _reasons(self) -> str:
        """What is wrong, most frequent first, and the first bad row in full."""
        counts = ", ".join(
            f"{count:,} {reason}" for reason, count in self._tally.dropped.most_common(5)
        )
        if not self._tally.first:
            return counts
        first = self._tally.first[0]
        field = f", {first.field}" if first.field else ""
        return f"{counts}; first: {first.file} row {first.row} (line {first.line}{field}): {first.message}"

    def _failed_report(self, table: RowTable) -> dict[str, Any]:
        report = self._report(table, table.count("training"), table.count("validation"))
        return dict(msgspec.to_builtins(report))

    # --- splitting and writing -----------------------------------------------------------------

    def _split(self, table: RowTable) -> set[bytes]:
        if self._inputs.validation is not None:
            return set()
        wanted = target(table.count("training"), self._source.held_out_share)
        return choose(table.groups(self._seed), wanted, self._source.max_held_out)

    def _write(self, table: RowTable) -> DataReport:
        pictures = PictureFolder(self._scratch / IMAGES, self._limits.images)
        images, _ = table.images_used()
        if pictures.keep_only(table.uses) != images:
            raise StorageFailed(f"images in {self._scratch} went away while it was made; try again")
        train = _RowWriter(self._scratch / TRAIN)
        kept = _RowWriter(self._scratch / HELD_OUT)
        with train, kept:
            self._write_rows(train, table.train_rows())
            self._write_rows(kept, table.held_out_rows(self._seed))
        digest = hashlib.sha256(train.sha256 + kept.sha256).hexdigest()
        report = self._report(table, train.rows, kept.rows)
        return msgspec.structs.replace(report, bytes=train.bytes + kept.bytes, sha256=digest)

    def _write_rows(self, writer: _RowWriter, rows: Iterator[GoodRow]) -> None:
        for good in rows:
            self._step()
            writer.add(_llava(good, exact=self._lengths.is_exact))

    def _report(self, table: RowTable, train: int, held_out: int) -> DataReport:
        images, image_bytes = table.images_used()
        return DataReport(
            format=self._format,
            rows=self._tally.rows,
            usable=train + held_out,
            train=train,
            held_out=held_out,
            text_only=table.text_only(),
            dropped=dict(self._tally.dropped),
            bad_rows=self._tally.first,
            notes=dict(self._tally.notes),
            refused_entries=dict(self._refused.counts),
            first_refused_entries=self._refused.first,
            images=images,
            image_bytes=image_bytes,
            tokens=Spread(table.tokens_at(0.5), table.tokens_at(0.95), table.tokens_at(1)),
            train_tokens=table.train_tokens(),
            exact_tokens=self._lengths.is_exact,
            max_length=self._max_length,
        )

    def _step(self) -> None:
        self._keep_going()
        self._steps += 1
        if self._steps % _ROWS_BETWEEN_CHECKS == 1:
            require_space(self._scratch, self._limits.min_free_bytes)


class _RowWriter:
    """Writes a JSON array of rows. ASCII only: xtuner opens it in whatever encoding is set."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.rows = 0
        self.bytes = 0

    @property
    def sha256(self) -> bytes:
        """Of what was written."""
        return self._digest.digest()

    def add(self, value: dict[str, Any]) -> None:
        """Write one row."""
        separator = b",\n" if self.rows else b"[\n"
        self._write(separator + json.dumps(value, separators=(",", ":")).encode("ascii"))
        self.rows += 1

    def __enter__(self) -> Self:
        with storage_errors(self._path):
            self._stream = open(self._path, "xb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with storage_errors(self._path), self._stream as stream:
            if kind is None:
                self._write(b"\n]\n" if self.rows else b"[]\n")
                stream.flush()
                os.fsync(stream.fileno())

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self.bytes += len(data)
        with storage_errors(self._path):
            self._stream.write(data)


def _split_key(stored: StoredRow) -> bytes:
    if stored.picture is not None:
        return stored.picture.name.encode()
    return hashlib.sha256(msgspec.msgpack.encode(stored.row.turns)).digest()


def _llava(good: GoodRow, *, exact: bool) -> dict[str, Any]:
    """The row as xtuner reads it: the image's tag in front, where xtuner would move it to."""
    row, picture = good.row, good.picture
    value: dict[str, Any] = {"id": f"{good.side}-{good.number}"}
    if picture is not None:
        value["image"] = picture.name
        value["image_wh"] = [picture.width, picture.height]
    if exact:
        # xtuner groups by it: negative means without image.
        value["length"] = good.tokens if picture is not None else -good.tokens
    value["conversations"] = [
        {
            "from": turn.role,
            "value": f"{IMAGE_TAG}\n{turn.text}".rstrip()
            if picture is not None and index == row.image_turn
            else turn.text,
        }
        for index, turn in enumerate(row.turns)
    ]
    return value
