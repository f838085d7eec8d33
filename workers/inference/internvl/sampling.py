"""From logits to tokens, each sequence by its own parameters and its own random numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from shared.errors import EngineError
from workers.inference.engines.base import Sampling

_GREEDY_BELOW = 1e-5  # dividing by less overflows


class TokenChoice:
    """Chooses the tokens of one sequence.

    Its random numbers are its own, so a seed gives the same text whatever else is decoded.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], ends: Collection[int]) -> None:
        self._sampling = sampling
        self._greedy = sampling.temperature < _GREEDY_BELOW
        self._ends = list(ends)
        self._count = 0
        self._seen: Tensor | None = None
        self._prompt = prompt
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest."""
        return (
            self._greedy
            and self._sampling.repetition_penalty == 1.0
            and self._count >= self._sampling.min_new_tokens
        )

    def next(self, logits: Tensor) -> int:
        """The next token from logits ``[vocab]``, which are left as they are."""
        scores = self._penalized(logits)
        if self._count < self._sampling.min_new_tokens:
            scores = scores.index_fill(0, self._on(self._ends, scores), -torch.inf)
        if self._greedy:
            return int(scores.argmax())
        return self._drawn(scores / self._sampling.temperature)

    def took(self, token: int) -> None:
        """Note the token that was chosen."""
        self._count += 1
        if self._seen is not None:
            self._seen[token] = True

    def _penalized(self, logits: Tensor) -> Tensor:
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            self._seen[self._on(self._prompt, logits)] = True
        weighed = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen, weighed, logits)

    def _drawn(self, scores: Tensor) -> int:
        kept = min(self._sampling.top_k or len(scores), len(scores))
        values, tokens = scores.topk(kept)
        shares = values.softmax(-1)
        if self._sampling.top_p < 1:
            # A token stays if those before it have not filled top_p yet: the first always stays.
            shares = shares * (shares.cumsum(-1) - shares < self._sampling.top_p)
        drawn = torch.multinomial(shares.cpu(), 1, generator=self._generator)
        return int(tokens[int(drawn)])

    @staticmethod
    def _on(numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=like.device)


def choose(logits: Tensor, choices: Sequence[TokenChoice]) -> list[int | EngineError]:
    """One token for each row of logits ``[rows, vocab]``, or why that row can have none."""
    likeliest: list[int] = logits.argmax(-1).tolist()
    return [_one(logits[row], choice, likeliest[row]) for row, choice in enumerate(choices)]


def _one(logits: Tensor, choice: TokenChoice, likeliest: int) -> int | EngineError:
    try:
        token = likeliest if choice.is_plain else choice.next(logits)
    except RuntimeError as error:  # the model gave no numbers that a draw can be made from
        return EngineError(f"the model's output cannot be sampled from: {error}")
    choice.took(token)
    return token
