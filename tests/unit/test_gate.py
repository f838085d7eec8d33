"""The gate of a chunk: which answer is kept, and what is asked once more."""

from __future__ import annotations

from shared.errors import EngineError, RequestTimedOut
from shared.quality import QualityGate
from workers.inference.engines.base import Completion, Image, Prompt, Sampling, Turn
from workers.inference.gate import Gate, Settled

GOOD = Completion("a red circle", "stop", 10, 3)
EMPTY = Completion("", "stop", 10, 1)
CUT = Completion("a red circle and a blue", "length", 10, 6)
FIRST = Prompt(7, [Turn("user", [0, "what?"])], Sampling(seed=3, temperature=0.0), [Image(b"x")])


def gate(**fields: int) -> Gate:
    """A gate with these rules."""
    return Gate(QualityGate(**fields), "batch_1")


def asked(heard: Prompt | Settled) -> Prompt:
    """The prompt that is to be asked next."""
    assert isinstance(heard, Prompt)
    return heard


def settled(heard: Prompt | Settled) -> Settled:
    """What was settled."""
    assert isinstance(heard, Settled)
    return heard


def test_a_good_answer_passes_at_once() -> None:
    """And nothing is kept of it."""
    found = settled(gate().hear(FIRST, GOOD))
    assert found.answer is GOOD
    assert found.verdict is not None
    assert (found.verdict.verdict, found.verdict.resampled) == ("pass", [])


def test_a_bad_answer_is_asked_again_about_the_same_images() -> None:
    """With other sampling."""
    again = asked(gate().hear(FIRST, EMPTY))
    assert (again.id, again.turns, again.images) == (FIRST.id, FIRST.turns, FIRST.images)
    assert again.sampling.seed != FIRST.sampling.seed
    assert again.sampling.temperature > 0
    assert again.sampling.max_tokens == FIRST.sampling.max_tokens


def test_the_number_of_times_is_capped() -> None:
    """Then the answer is there for review; what was thrown away is accounted for."""
    made = gate(resamples=2)
    second = asked(made.hear(FIRST, EMPTY))
    third = asked(made.hear(second, EMPTY))
    assert len({prompt.sampling.seed for prompt in (FIRST, second, third)}) == 3
    found = settled(made.hear(third, EMPTY))
    assert found.verdict is not None
    assert (found.verdict.verdict, found.verdict.reasons) == ("review", ["empty"])
    assert found.verdict.resampled == [["empty"], ["empty"]]
    assert (made.prompt_tokens, made.completion_tokens) == (20, 2)


def test_the_best_answer_is_kept_whenever_it_came() -> None:
    """With the sampling that made it."""
    made = gate(resamples=2)
    second = asked(made.hear(FIRST, EMPTY))
    third = asked(made.hear(second, CUT))
    found = settled(made.hear(third, EMPTY))
    assert found.answer is CUT
    assert found.verdict is not None
    assert found.verdict.reasons == ["truncated"]
    assert found.verdict.seed == second.sampling.seed
    assert (made.prompt_tokens, made.completion_tokens) == (20, 2)


def test_an_error_after_an_answer_leaves_the_answer() -> None:
    """An error instead of a first one is an error."""
    made = gate()
    again = asked(made.hear(FIRST, CUT))
    found = settled(made.hear(again, RequestTimedOut()))
    assert found.answer is CUT
    assert found.verdict is not None
    assert found.verdict.verdict == "review"
    failed = settled(made.hear(FIRST, EngineError("no")))
    assert isinstance(failed.answer, EngineError)
    assert failed.verdict is None


def test_nothing_is_asked_where_nothing_may_be() -> None:
    """For prompts that were with an engine that crashed."""
    found = settled(gate().hear(FIRST, EMPTY, may_ask=False))
    assert found.verdict is not None
    assert (found.verdict.verdict, found.verdict.resampled) == ("review", [])
    assert settled(gate(resamples=0).hear(FIRST, EMPTY)).verdict == found.verdict
