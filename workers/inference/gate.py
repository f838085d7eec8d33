"""The quality gate where answers come back: judges them, and says what to ask once more.

It holds something only for prompts whose first answer did not pass; of their answers, the best.
"""

from __future__ import annotations

import msgspec

from shared.captions import CaptionSource
from shared.errors import VlmqError
from shared.quality import QualityGate, Reason, Verdict, badness, resampling
from workers.inference.engines.base import Completion, Prompt, Sampling


class _Tried(msgspec.Struct):
    """The best answer so far, what is wrong with it, and what was with those thrown away."""

    first: Sampling
    best: Completion
    reasons: list[Reason]
    sampling: Sampling
    thrown_away: list[list[Reason]] = []


class Settled(msgspec.Struct, frozen=True):
    """What is taken for the answer to a prompt; ``verdict`` is there unless it is an error."""

    answer: Completion | VlmqError
    verdict: Verdict | None


class Gate:
    """The gate of one chunk.

    ``prompt_tokens`` and ``completion_tokens`` are those of answers that were thrown away.
    """

    def __init__(self, rules: QualityGate, batch_id: str) -> None:
        self._rules = rules
        self._batch_id = batch_id
        self._tried: dict[int, _Tried] = {}
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def hear(
        self, prompt: Prompt, answer: Completion | VlmqError, *, may_ask: bool = True
    ) -> Prompt | Settled:
        """Judge an answer: the prompt to ask next, with other sampling, or what is settled.

        An error counts only if there was no answer before; then it is what was there.
        """
        tried = self._tried.pop(prompt.id, None)
        if isinstance(answer, VlmqError):
            return Settled(answer, None) if tried is None else _settled(tried)
        reasons = self._rules.judge(answer.text, answer.finish_reason)
        if tried is None:
            if not reasons:
                return Settled(answer, Verdict("pass"))
            tried = _Tried(prompt.sampling, answer, reasons, prompt.sampling)
        else:
            self._compare(tried, answer, reasons, prompt.sampling)
        if not may_ask or not tried.reasons or len(tried.thrown_away) >= self._rules.resamples:
            return _settled(tried)
        self._tried[prompt.id] = tried
        return self._ask(prompt, tried)

    def _compare(
        self, tried: _Tried, answer: Completion, reasons: list[Reason], sampling: Sampling
    ) -> None:
        """Keep the better one; of two that are as bad, the one before."""
        worse, worse_reasons = answer, reasons
        if badness(reasons) < badness(tried.reasons):
            worse, worse_reasons = tried.best, tried.reasons
            tried.best, tried.reasons, tried.sampling = answer, reasons, sampling
        tried.thrown_away = [*tried.thrown_away, worse_reasons]
        self.prompt_tokens += worse.prompt_tokens
        self.completion_tokens += worse.completion_tokens

    def _ask(self, prompt: Prompt, tried: _Tried) -> Prompt:
        first = tried.first
        how = resampling(
            self._rules,
            tried.reasons,
            attempt=len(tried.thrown_away) + 1,
            key=f"{self._batch_id}|{prompt.id}",
            seed=first.seed,
            temperature=first.temperature,
            top_k=first.top_k,
            repetition_penalty=first.repetition_penalty,
        )
        sampling = msgspec.structs.replace(first, **msgspec.structs.asdict(how))
        return msgspec.structs.replace(prompt, sampling=sampling)


def _settled(tried: _Tried) -> Settled:
    is_first = tried.sampling is tried.first
    verdict = Verdict(
        "review" if tried.reasons else "pass",
        tried.reasons,
        tried.thrown_away,
        seed=None if is_first else tried.sampling.seed,
        temperature=None if is_first else tried.sampling.temperature,
    )
    return Settled(tried.best, verdict)


def gate_of(source: CaptionSource | None, batch_id: str) -> Gate | None:
    """The gate that a caption job asks for, if it does."""
    if source is None or source.quality is None:
        return None
    return Gate(source.quality, batch_id)
