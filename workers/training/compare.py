"""Asks the base and the tuned model about the held-out rows, by two ordinary batches.

So the tuned model is loaded by the very engine that will serve it, on whatever machine that is, and
has answered there before anybody else may use it. What was submitted is noted in the job's folder: a
worker that takes the job over waits for the same batches.
"""

from __future__ import annotations

import base64
import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from shared.errors import ComparisonFailed, ComparisonTimedOut, NotFound
from shared.finetunes import Finetune
from shared.jobs import TERMINAL, Batch, BatchState
from shared.storage import atomic_file, read_json, storage_errors, write_bytes, write_json
from shared.stores import Stores
from workers.training.held_out import HeldOutRow, read_held_out

ENDPOINT = "/v1/chat/completions"
WINDOW = "7d"
POLL_S = 0.5
ANSWER_TOKENS = 512
COMPARISON = "comparison.jsonl"
METRICS = "metrics.json"
_SUBMITTED = "compare.json"
_PAGE_LINES = 1000
_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp", b"GI": "image/gif"}

Side = Literal["base", "tuned"]
SIDES: tuple[Side, ...] = ("base", "tuned")


class ComparedRow(msgspec.Struct, frozen=True):
    """One line of ``comparison.jsonl``. An answer is None if there was an error instead."""

    image: str | None
    question: str
    reference: str
    base: str | None
    tuned: str | None
    exact_match: dict[Side, bool]
    errors: dict[Side, str] = {}


class Score(msgspec.Struct, frozen=True):
    """How a model did: shares from 0 to 1. ``similarity`` is the mean of difflib's ratio."""

    answered: int
    exact_match: float
    similarity: float


class Comparison(msgspec.Struct, frozen=True):
    """``metrics.json``."""

    rows: int
    base: Score
    tuned: Score


def compare(
    job: Finetune,
    stores: Stores,
    folder: Path,
    keep_going: Callable[[], None],
    tell: Callable[[str | None], None] = lambda _: None,
) -> Comparison:
    """Compare on the held-out rows of ``folder`` and write both result files there.

    ``tuned_name`` must be in the registry, as a candidate. ``keep_going`` is called often and may
    raise to stop; ``tell`` is told what is waited for.

    Raises: ComparisonTimedOut if a model is not served or does not answer in time, ComparisonFailed if
    the tuned one answers nothing.
    """
    rows = read_held_out(folder, job.data.max_compared)
    if not rows:
        raise ComparisonFailed("no rows were held out, so nothing shows that the model answers")
    asking = _Asking(job, stores, folder, keep_going, tell)
    answers = {side: asking.answers(side, rows) for side in SIDES}
    compared = [
        _compared(row, [answers[side].get(number) for side in SIDES])
        for number, row in enumerate(rows)
    ]
    _require_answers(compared)
    comparison = Comparison(
        len(rows), *(_score([_judged(row, side) for row in compared]) for side in SIDES)
    )
    with atomic_file(folder / COMPARISON) as stream:
        stream.writelines(msgspec.json.encode(row) + b"\n" for row in compared)
    write_bytes(
        folder / METRICS, msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n"
    )
    return comparison


class _Answer(msgspec.Struct, frozen=True):
    text: str | None
    error: str | None


class _Asking:
    """The two batches of one job."""

    def __init__(
        self,
        job: Finetune,
        stores: Stores,
        folder: Path,
        keep_going: Callable[[], None],
        tell: Callable[[str | None], None],
    ) -> None:
        self._job = job
        self._stores = stores
        self._folder = folder
        self._keep_going = keep_going
        self._tell = tell
        self._until = time.monotonic() + stores.settings.finetune.compare_wait_s

    def answers(self, side: Side, rows: Sequence[HeldOutRow]) -> dict[int, _Answer]:
        """Each row's answer by its number."""
        batch = self._ended(self._submitted(side, rows), self._model(side))
        if batch.state is not BatchState.COMPLETED:
            raise ComparisonFailed(
                f"the batch {batch.id} that asks {self._model(side)} ended as {batch.state}"
            )
        return dict(self._read(batch))

    def _model(self, side: Side) -> str:
        return self._job.model if side == "base" else self._job.tuned_name

    def _submitted(self, side: Side, rows: Sequence[HeldOutRow]) -> str:
        """The batch's id; submitted now unless an earlier worker did."""
        note = self._folder / _SUBMITTED
        known: dict[str, str] = read_json(note) or {}
        if side in known and self._exists(known[side]):
            return known[side]
        model = self._model(side)
        filename = f"{self._job.id}_{side}.jsonl"
        owner = self._job.owner
        with self._stores.files.begin(owner=owner, filename=filename, purpose="batch") as writer:
            for number, row in enumerate(rows):
                writer.write(_request(number, row, model))
            record = writer.commit()
        batch = self._stores.batches.create(
            owner=owner,
            input_file=record,
            endpoint=ENDPOINT,
            completion_window=WINDOW,
            metadata={"finetune": self._job.id, "compares": side},
        )
        write_json(note, {**known, side: batch.id})
        return batch.id

    def _exists(self, batch_id: str) -> bool:
        try:
            self._stores.batches.get(self._job.owner, batch_id)
        except NotFound:
            return False
        return True

    def _ended(self, batch_id: str, model: str) -> Batch:
        while True:
            batch = self._stores.batches.get(self._job.owner, batch_id)
            if batch.state in TERMINAL:
                self._tell(None)
                return batch
            self._keep_going()
            served = self._stores.presence.obtainable(model)
            refusal = self._stores.presence.refusal(model)
            self._tell(None if served else f"a node that serves {model}{_quoted(refusal)}")
            if time.monotonic() > self._until:
                raise ComparisonTimedOut(_too_slow(model, batch, refusal, served=served))
            time.sleep(POLL_S)

    def _read(self, batch: Batch) -> Iterator[tuple[int, _Answer]]:
        after, complete = 0, False
        while not complete:
            page = self._stores.results.page(batch.owner, batch.id, after=after, limit=_PAGE_LINES)
            for line in b"".join(page.blocks()).splitlines():
                yield _answer(msgspec.json.decode(line))
            after, complete = page.next_after, page.complete


def _request(number: int, row: HeldOutRow, model: str) -> bytes:
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in row.turns]
    if row.image is not None:
        text = row.turns[row.image_turn][1]
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(row.image)}}
        ]
        # A part without text would still be a line of its own, which training has not.
        parts += [{"type": "text", "text": text}] if text else []
        messages[row.image_turn]["content"] = parts
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
    }
    request = {"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}
    return msgspec.json.encode(request) + b"\n"


def _data_url(image: Path) -> str:
    with storage_errors(image):
        data = image.read_bytes()
    # What it really is decides the reader; the type only has to be one of an image.
    kind = _TYPES.get(data[:2], "image/jpeg")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _answer(line: dict[str, Any]) -> tuple[int, _Answer]:
    number = int(line["custom_id"])
    response, error = line["response"], line["error"]
    if response is not None and response["status_code"] < 400:
        text = response["body"]["choices"][0]["message"]["content"]
        return number, _Answer(text, None)
    reason = error if error is not None else response["body"]["error"]
    return number, _Answer(None, f"{reason['code']}: {reason['message']}")


def _compared(row: HeldOutRow, answers: Sequence[_Answer | None]) -> ComparedRow:
    found = [answer or _Answer(None, "there is no answer") for answer in answers]
    texts = [None if answer.text is None else answer.text.strip() for answer in found]
    base, tuned = texts
    return ComparedRow(
        image=None if row.image is None else row.name,
        question=row.question,
        reference=row.reference,
        base=base,
        tuned=tuned,
        exact_match={side: text == row.reference for side, text in zip(SIDES, texts, strict=True)},
        errors={
            side: answer.error
            for side, answer in zip(SIDES, found, strict=True)
            if answer.error is not None
        },
    )


def _judged(row: ComparedRow, side: Side) -> tuple[str | None, str]:
    return (row.base if side == "base" else row.tuned), row.reference


def _score(pairs: Sequence[tuple[str | None, str]]) -> Score:
    answered = [(text, reference) for text, reference in pairs if text is not None]
    alike = sum(difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in answered)
    return Score(
        answered=len(answered),
        exact_match=sum(text == reference for text, reference in answered) / len(pairs),
        similarity=alike / len(pairs),
    )


def _require_answers(rows: Sequence[ComparedRow]) -> None:
    if any(row.tuned is not None for row in rows):
        return
    reason = next((row.errors["tuned"] for row in rows if "tuned" in row.errors), "")
    raise ComparisonFailed(f"the tuned model answered none of {len(rows)} held-out rows ({reason})")


def _quoted(refusal: str | None) -> str:
    return "" if refusal is None else f" ({refusal})"


def _too_slow(model: str, batch: Batch, refusal: str | None, *, served: bool) -> str:
    if not served:
        return (
            f"no running node serves {model}{_quoted(refusal)}; serve its base model, then resume the job "
            "(finetune.compare_wait_s is how long is waited)"
        )
    done = batch.completed + batch.failed
    return (
        f"{model} answered {done} of {batch.total} held-out rows within finetune.compare_wait_s; "
        "raise it, or compare fewer rows (max_compared)"
    )
