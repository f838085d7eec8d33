"""Running one chunk of a batch: read, prepare, ask the engines, write the shard, commit.

The chunk's lines become items; each item ends with exactly one line, for its answer or its error.
Preparing (images) overlaps with the engines' work on earlier items. Nothing is visible to anybody
before the shard is renamed, and nothing counts before Redis accepts its token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from shared import tally
from shared.chat import completion_body
from shared.clock import unix_now
from shared.errors import (
    EngineCrashed,
    EngineUnavailable,
    ImagesCutOtherwise,
    InvalidRequest,
    ModelNotFound,
    RequestTimedOut,
    VlmqError,
    WorkerCrashed,
)
from shared.jobs import BatchProblem
from shared.leases import Lease
from shared.manifest import Manifest
from shared.models import ModelDefaults, ModelRecord
from shared.quality import Verdict
from shared.settings import Settings
from shared.shards import ShardHeader, shard_path, write_shard
from workers.inference.batch_lines import (
    BatchLine,
    Line,
    LineExtras,
    error_line,
    item_id,
    output_line,
    problem_of,
)
from workers.inference.chunk_input import ChunkInput
from workers.inference.engines.base import Answer, Completion, Prompt
from workers.inference.engines.flight import Flight
from workers.inference.engines.standby import Standby
from workers.inference.gate import Gate, gate_of
from workers.inference.journal import Journal
from workers.inference.prompts import build_prompt
from workers.inference.provenance import provenance_of
from workers.inference.recalling import Recall, Recalled
from workers.inference.suspects import alone, engines_lock, retry_suspects, together

_GROUP_ITEMS = 64
_GROUP_BYTES = 4 << 20
_HELD_BYTES = 256 << 20
"""No more images are read while those that engines have not answered for take so much memory."""
_POLL_S = 0.25

KeepGoing = Callable[[], None]
"""Returns if the work should go on; raises LeaseLost, BatchCancelled, … otherwise."""


class _Item(msgspec.Struct):
    line: Line
    request: BatchLine


class EnginesAway(VlmqError):
    """The engines were unloaded or replaced on purpose; the chunk waits until they are back."""

    code = "engines_away"


class ChunkResult(msgspec.Struct, frozen=True):
    """What a chunk came to: its shard is on disk."""

    header: ShardHeader
    problems: list[BatchProblem]


class ChunkRun:
    """One attempt at one chunk."""

    def __init__(
        self,
        lease: Lease,
        *,
        batch_dir: Path,
        manifest: Manifest,
        chunk_input: ChunkInput,
        model: ModelRecord | None,
        settings: Settings,
        flight: Flight,
        keep_going: KeepGoing,
        recall: Recall | None = None,
    ) -> None:
        self._lease = lease
        self._batch_dir = batch_dir
        self._input = chunk_input
        self._model = model
        self._name = lease.model
        self._settings = settings
        self._flight = flight
        self._keep_going = keep_going
        self._recall = recall
        self._standby = Standby(settings.run_dir, lease.model)
        self._manifest = manifest
        self._chunk = manifest.chunk(int(lease.unit))
        self._items: dict[int, _Item] = {}
        self._suspects: list[Prompt] = []
        self._asked: dict[int, Prompt] = {}
        self._outputs: dict[int, bytes] = {}
        self._errors: dict[int, bytes] = {}
        self._problems: list[BatchProblem] = []
        self._counts: Counter[str] = Counter()
        self._gate = gate_of(lease.spec.source, lease.batch_id)
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._images = 0
        self._created = unix_now()
        self._heard_at = self._answered_at = time.monotonic()

    def run(self) -> ChunkResult:
        """Answer every item and write the shard.

        Raises: EnginesAway, EngineUnavailable when no engine answered for long, StorageFull,
        StorageFailed, and whatever ``keep_going`` raises. The engines are told to forget what they
        still had.
        """
        lines = self._input.lines(self._chunk)
        try:
            if self._lease.attempts >= self._settings.queue.max_chunk_attempts:
                self._fail_all(lines, WorkerCrashed())
            elif self._model is None:
                self._fail_all(lines, ModelNotFound(f"the model '{self._name}' was removed"))
            else:
                self._parse(lines)
                duplicates = self._recall_lines(lines)
                asked = [
                    item for item in self._items.values() if item.line.number not in duplicates
                ]
                self._answer(asked, self._model.defaults)
                self._answer(self._copy_firsts(duplicates), self._model.defaults)
        except BaseException:
            self._flight.abort()
            raise
        return self._write()

    def _fail_all(self, lines: Sequence[Line], error: VlmqError) -> None:
        for line in lines:
            self._fail(line, line.custom_id(), error, in_batch=True)

    # --- in ---

    def _parse(self, lines: Sequence[Line]) -> None:
        first = self._chunk.first_line
        last = lines[-1].number if lines else first
        duplicates = self._manifest.duplicates(first, last)
        for line in lines:
            try:
                request = self._input.parse(line, duplicates)
            except VlmqError as error:
                self._fail(line, line.custom_id(), error)
                self._problems.append(problem_of(line, error))
                continue
            self._items[line.number] = _Item(line, request)

    def _answer(self, items: Sequence[_Item], defaults: ModelDefaults) -> None:
        """Have these items answered, those that kill engines alone."""
        if not items:
            return
        with together(self._lock_path(), self._keep_going, time.sleep):
            self._heard_at = self._answered_at = time.monotonic()
            self._ask(items, defaults)
        self._settle_suspects()
        self._suspects.clear()

    def _ask(self, items: Sequence[_Item], defaults: ModelDefaults) -> None:
        """Prepare items and keep the engines supplied with them."""
        # How images are to be cut is said by the engines; without one there is nobody to ask yet.
        while not self._flight.connected:
            self._flight.look(_POLL_S)
            self._keep_going()
            self._require_engine()
        group: list[Prompt] = []
        group_bytes = 0
        journal = self._journal()
        for item in items:
            prompt = self._prepare(item, defaults, journal)
            if prompt is None:
                continue
            group.append(prompt)
            group_bytes += sum(len(image.data) for image in prompt.images)
            if len(group) >= _GROUP_ITEMS or group_bytes >= _GROUP_BYTES:
                self._submit(group)
                group, group_bytes = [], 0
        if journal is not None:
            journal.enter(None)
        self._submit(group)
        while self._asked:
            self._collect(_POLL_S)

    # --- what need not be asked ---

    def _recall_lines(self, lines: Sequence[Line]) -> dict[int, int]:
        """Write the lines of images whose captions are known; returns duplicates with their firsts."""
        if self._recall is None:
            return {}
        for number, recalled in self._recall.known(lines).items():
            self._copy(self._items.pop(number), recalled)
        firsts = self._recall.firsts(lines)
        return {number: first for number, first in firsts.items() if number in self._items}

    def _copy_firsts(self, duplicates: dict[int, int]) -> list[_Item]:
        """Write the lines of duplicates; returns those that must be asked about all the same."""
        left = []
        for number, first in duplicates.items():
            assert self._recall is not None, "only a synced set has duplicates"
            item = self._items[number]
            recalled = self._recall.first(item.line, first, self._outputs)
            if recalled is None:
                left.append(item)
            else:
                self._copy(item, recalled)
        return left

    def _copy(self, item: _Item, recalled: Recalled) -> None:
        caption, number = recalled.caption, item.line.number
        if caption.verdict is not None:
            # What was thrown away was so when it was asked for, not now.
            kept = msgspec.structs.replace(caption.verdict, resampled=[])
            tally.count_verdict(self._counts, kept)
        name = item_id(self._lease.batch_id, number)
        body = completion_body(
            completion_id=f"chatcmpl-{name}",
            created=caption.created,
            model=self._name,
            text=caption.text,
            finish_reason=caption.finish_reason,
            prompt_tokens=caption.prompt_tokens,
            completion_tokens=caption.completion_tokens,
        )
        self._outputs[number] = output_line(name, item.request.custom_id, body, recalled.extras)

    def _journal(self) -> Journal | None:
        if self._lease.attempts == 0:
            return None
        return Journal(self._batch_dir / "attempts" / f"{self._lease.unit}.json")

    def _prepare(
        self, item: _Item, defaults: ModelDefaults, journal: Journal | None
    ) -> Prompt | None:
        self._keep_going()
        number = item.line.number
        if journal is not None:
            if journal.given_up(number):
                self._fail(item.line, item.request.custom_id, WorkerCrashed())
                return None
            journal.enter(number)
        try:
            body, read_image = self._input.complete(item.line, item.request)
            return build_prompt(number, body, defaults, read_image, limits=self._settings.images)
        except InvalidRequest as error:
            self._fail(item.line, item.request.custom_id, error)
            return None

    def _submit(self, group: list[Prompt]) -> None:
        self._keep_going()
        if not group:
            return
        if not self._asked:
            self._answered_at = time.monotonic()
        self._asked.update((prompt.id, prompt) for prompt in group)
        self._flight.submit(group)
        self._collect(0)
        while self._asked and (self._flight.room < _GROUP_ITEMS or self._held() > _HELD_BYTES):
            self._collect(_POLL_S)

    def _held(self) -> int:
        """The bytes of images that are with the engines."""
        return sum(len(image.data) for asked in self._asked.values() for image in asked.images)

    # --- out ---

    def _collect(self, timeout_s: float) -> None:
        answers = self._flight.results(timeout_s)
        if answers:
            self._heard_at = self._answered_at = time.monotonic()
        again: list[Prompt] = []
        for prompt_id, answer in answers:
            prompt = self._asked.pop(prompt_id)
            if isinstance(answer, EngineCrashed):
                self._suspects.append(prompt)
            elif self._gate is None:
                self._record(prompt_id, answer)
            elif (once_more := self._judge(self._gate, prompt, answer)) is not None:
                again.append(once_more)
        if again:
            self._asked.update((prompt.id, prompt) for prompt in again)
            self._flight.submit(again)
        if timeout_s:
            self._keep_going()
            self._require_engine()
            self._require_progress()

    def _require_progress(self) -> None:
        """Give up what hangs in the engines."""
        if not self._hangs():
            return
        self._flight.abort()
        for number in list(self._asked):
            self._settle(self._asked.pop(number), RequestTimedOut())
        self._answered_at = time.monotonic()

    def _require_engine(self) -> None:
        """Give the chunk up if this machine's engines stay away; another's may have it.

        At once if they were sent away: others' chunks need this process.
        """
        if self._flight.connected:
            self._heard_at = max(
                self._heard_at, time.monotonic() - self._settings.node.engine_wait_s
            )
        elif self._standby.is_on():
            raise EnginesAway()
        elif time.monotonic() - self._heard_at > 2 * self._settings.node.engine_wait_s:
            raise EngineUnavailable()

    def _settle_suspects(self) -> None:
        if not self._suspects:
            return
        with alone(self._lock_path(), self._keep_going, time.sleep):
            self._heard_at = time.monotonic()
            prompts = {prompt.id: prompt for prompt in self._suspects}
            for prompt_id, answer in retry_suspects(self._suspects, self._run_group):
                self._settle(prompts[prompt_id], answer)

    def _lock_path(self) -> Path:
        return engines_lock(self._settings.run_dir, self._name)

    def _run_group(self, prompts: Sequence[Prompt]) -> list[Answer]:
        waiting = {prompt.id for prompt in prompts}
        answers: list[Answer] = []
        self._answered_at = time.monotonic()
        self._flight.submit(prompts)
        while waiting:
            for prompt_id, answer in self._flight.results(_POLL_S):
                waiting.discard(prompt_id)
                answers.append((prompt_id, answer))
                self._heard_at = self._answered_at = time.monotonic()
            self._keep_going()
            self._require_engine()
            if self._hangs():
                self._flight.abort()
                answers += [(prompt_id, RequestTimedOut()) for prompt_id in waiting]
                waiting.clear()
        return answers

    def _hangs(self) -> bool:
        """Whether engines had prompts for a request's whole time and gave not one answer.

        While an engine starts again nobody has them, and its start may take longer than that.
        """
        now_s = time.monotonic()
        if not self._flight.sent:
            self._answered_at = now_s
        return now_s - self._answered_at > self._settings.api.request_timeout_s

    def _settle(self, prompt: Prompt, answer: Completion | VlmqError) -> None:
        """Take the best answer that there was for a prompt; nothing more is asked."""
        if self._gate is None:
            self._record(prompt.id, answer)
        else:
            self._judge(self._gate, prompt, answer, may_ask=False)

    def _judge(
        self, gate: Gate, prompt: Prompt, answer: Completion | VlmqError, *, may_ask: bool = True
    ) -> Prompt | None:
        """Record what the gate settles for, or return what to ask once more."""
        heard = gate.hear(prompt, answer, may_ask=may_ask)
        if isinstance(heard, Prompt):
            return heard
        if heard.verdict is not None:
            tally.count_verdict(self._counts, heard.verdict)
        self._record(prompt.id, heard.answer, heard.verdict)
        return None

    def _record(
        self, number: int, answer: Completion | VlmqError, verdict: Verdict | None = None
    ) -> None:
        item = self._items[number]
        if isinstance(answer, ImagesCutOtherwise):
            # Not the item's fault: whoever takes the chunk next asks how images are cut by then.
            raise EnginesAway()
        if isinstance(answer, VlmqError):
            self._fail(item.line, item.request.custom_id, answer)
            return
        name = item_id(self._lease.batch_id, number)
        self._prompt_tokens += answer.prompt_tokens
        self._completion_tokens += answer.completion_tokens
        self._images += item.request.body.image_count
        body = completion_body(
            completion_id=f"chatcmpl-{name}",
            created=self._created,
            model=self._name,
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
        )
        extras = None if verdict is None else LineExtras(verdict)
        self._outputs[number] = output_line(name, item.request.custom_id, body, extras)

    def _fail(
        self, line: Line, custom_id: str | None, error: VlmqError, *, in_batch: bool = False
    ) -> None:
        name = item_id(self._lease.batch_id, line.number)
        self._counts[f"{tally.FAILED}:{error.code}"] += 1
        self._errors[line.number] = error_line(name, custom_id, error, in_batch=in_batch)

    def _write(self) -> ChunkResult:
        output, errors = _joined(self._outputs), _joined(self._errors)
        if len(self._outputs) + len(self._errors) != self._chunk.items:
            raise AssertionError(
                f"{len(self._outputs)} answers and {len(self._errors)} errors "
                f"for {self._chunk.items} items"
            )
        if self._gate is not None:
            self._prompt_tokens += self._gate.prompt_tokens
            self._completion_tokens += self._gate.completion_tokens
        provenance = self._provenance()
        header = ShardHeader(
            output_bytes=len(output),
            error_bytes=len(errors),
            completed=len(self._outputs),
            failed=len(self._errors),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            images=self._images,
            counts=dict(self._counts),
            provenance_bytes=len(provenance),
        )
        path = shard_path(self._batch_dir, self._chunk.index, self._lease.token)
        write_shard(path, header, output, errors, provenance)
        return ChunkResult(header, self._problems)

    def _provenance(self) -> bytes:
        """What the answers of an image set came of; lines of a file say it themselves."""
        source = self._lease.spec.source
        if source is None or self._model is None:
            return b""
        return provenance_of(source, self._model, self._settings.images.scaling)


def _joined(lines: dict[int, bytes]) -> bytes:
    return b"".join(lines[number] for number in sorted(lines))
