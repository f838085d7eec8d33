"""Choosing tokens by each sequence's own parameters."""

from __future__ import annotations

import torch

from shared.errors import EngineError
from workers.inference.engines.base import Sampling
from workers.inference.internvl.sampling import TokenChoice, choose

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5, -1.0])
WARM = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=5)


def _draws(sampling: Sampling, count: int = 60, prompt: tuple[int, ...] = ()) -> list[int]:
    choice = TokenChoice(sampling, prompt, ends={1})
    return [int(choice.next(LOGITS)) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    """Greedy, and so does a temperature too small to divide by."""
    assert set(_draws(Sampling(temperature=0))) == {1}
    assert set(_draws(Sampling(temperature=1e-30, top_p=1.0, top_k=0))) == {1}


def test_without_limits_every_token_can_come() -> None:
    """top_k 0 and top_p 1 mean off."""
    assert set(_draws(WARM, 400)) == {0, 1, 2, 3, 4}


def test_top_k_keeps_the_likeliest_k() -> None:
    """The rest never comes; a k beyond the vocabulary is no error."""
    assert set(_draws(Sampling(temperature=2.0, top_p=1.0, top_k=2, seed=1), 200)) == {1, 2}
    assert set(_draws(Sampling(temperature=2.0, top_p=1.0, top_k=99, seed=1), 400)) == set(range(5))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Token 1 alone holds 62 %, with token 2 85 %."""
    assert set(_draws(Sampling(temperature=1.0, top_p=0.6, top_k=0, seed=1), 200)) == {1}
    assert set(_draws(Sampling(temperature=1.0, top_p=0.8, top_k=0, seed=1), 200)) == {1, 2}


def test_repetition_penalty_weighs_on_prompt_and_answer() -> None:
    """The likeliest token was in the prompt, so the next likeliest wins, and then the third."""
    sampling = Sampling(temperature=0, repetition_penalty=4.0)
    choice = TokenChoice(sampling, [1], ends=())
    first = choose(LOGITS[None], [choice])
    second = choose(LOGITS[None], [choice])
    assert (first, second) == ([2], [0])


def test_an_answer_does_not_end_before_min_new_tokens() -> None:
    """The end token is the likeliest, yet it comes only third."""
    choice = TokenChoice(Sampling(temperature=0, min_new_tokens=2), [], ends={1})
    assert [choose(LOGITS[None], [choice]) for _ in range(3)] == [[2], [2], [1]]


def test_a_seed_gives_the_same_draws_in_any_company() -> None:
    """A row's random numbers are its own; another seed gives others."""
    alone = TokenChoice(WARM, [], ends=())
    company = [TokenChoice(WARM, [], ends=()) for _ in range(3)]
    company[0] = TokenChoice(Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=6), [], ends=())
    one, three = LOGITS[None], LOGITS.expand(3, -1)
    drawn = [(choose(one, [alone])[0], choose(three, company)) for _ in range(40)]
    assert all(single == rows[1] == rows[2] for single, rows in drawn)
    assert any(single != rows[0] for single, rows in drawn)


def test_a_row_without_usable_numbers_fails_alone() -> None:
    """NaN in one row is that row's error."""
    logits = torch.stack([LOGITS, torch.full((5,), torch.nan)])
    good, bad = choose(logits, [TokenChoice(WARM, [], ()), TokenChoice(WARM, [], ())])
    assert isinstance(good, int)
    assert isinstance(bad, EngineError)
