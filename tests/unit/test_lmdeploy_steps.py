"""How lmdeploy's PyTorch engine is hurried: by a number that it keeps, without lmdeploy here."""

from __future__ import annotations

from types import SimpleNamespace

from workers.inference.engines.lmdeploy_steps import AT_ONCE, PrefillSteps

USUAL = 16


def loop_with(interval: int) -> SimpleNamespace:
    """What lmdeploy's engine makes when its first request comes."""
    config = SimpleNamespace(prefill_interval=interval)
    return SimpleNamespace(inputs_maker=SimpleNamespace(config=config))


def interval_of(engine: SimpleNamespace) -> int:
    """What the engine looks at before each of its steps."""
    interval: int = engine._engine_loop.inputs_maker.config.prefill_interval
    return interval


def test_a_hurried_engine_begins_at_once_and_afterwards_as_usual() -> None:
    """However often, and whatever the usual interval is."""
    for usual in (USUAL, 3):
        engine = SimpleNamespace(_engine_loop=loop_with(usual))
        steps = PrefillSteps(engine)
        for _ in range(3):
            steps.hurry(True)
            assert interval_of(engine) == AT_ONCE == 0
            steps.hurry(False)
            assert interval_of(engine) == usual


def test_to_be_hurried_twice_does_not_make_haste_usual() -> None:
    """What was there first is what comes back."""
    engine = SimpleNamespace(_engine_loop=loop_with(USUAL))
    steps = PrefillSteps(engine)
    steps.hurry(True)
    steps.hurry(True)
    steps.hurry(False)
    steps.hurry(False)
    assert interval_of(engine) == USUAL


def test_before_the_first_request_there_is_nothing_to_hurry() -> None:
    """The engine has no loop yet; once it has one it can be hurried."""
    engine = SimpleNamespace(_engine_loop=None)
    steps = PrefillSteps(engine)
    steps.hurry(True)
    steps.hurry(False)
    assert engine._engine_loop is None
    engine._engine_loop = loop_with(USUAL)
    steps.hurry(True)
    assert interval_of(engine) == AT_ONCE
    steps.hurry(False)
    assert interval_of(engine) == USUAL


def test_another_lmdeploy_is_left_as_it_is() -> None:
    """One that keeps its interval elsewhere, or has none, only lets chats wait."""
    for loop in (SimpleNamespace(), SimpleNamespace(inputs_maker=SimpleNamespace(config=object()))):
        engine = SimpleNamespace(_engine_loop=loop)
        steps = PrefillSteps(engine)
        steps.hurry(True)
        steps.hurry(False)
        assert engine._engine_loop is loop
        assert not hasattr(loop, "prefill_interval")
    PrefillSteps(SimpleNamespace()).hurry(True)
