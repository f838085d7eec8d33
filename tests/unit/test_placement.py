"""How many replicas, where, with how much memory: a table of machines and entries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.settings import NodeSettings, ServeSettings
from workers.placement import (
    Machine,
    Seat,
    count_batch_processes,
    count_replicas,
    count_running,
    place,
    seats,
)

GIB = 1024**3
H200 = Machine(cores=16, gpu_bytes={"0": 141 * GIB, "1": 141 * GIB})
PYTORCH = {"engine": "lmdeploy", "options": {"backend": "pytorch"}, "replicas": "auto"}


def entry(model: str = "m", **fields: Any) -> ServeSettings:
    """One table of ``node.serve``."""
    return ServeSettings(model=model, **fields)


@pytest.mark.parametrize(
    ("fields", "weights", "machine", "expected"),
    [
        ({"replicas": 3, "gpus": ["0"]}, 4 * GIB, H200, 3),
        # What one process per GPU can fill gets one process per GPU.
        ({"replicas": "auto", "engine": "lmdeploy", "gpus": ["0"]}, 4 * GIB, H200, 1),
        ({"replicas": "auto", "engine": "lmdeploy", "gpus": ["0", "1"]}, 4 * GIB, H200, 2),
        ({"replicas": "auto", "engine": "transformers", "gpus": ["0", "1"]}, 4 * GIB, H200, 2),
        ({"replicas": "auto", "engine": "echo"}, None, H200, 1),
        # The PyTorch engine wants four per GPU ...
        ({**PYTORCH, "gpus": ["0"]}, 4 * GIB, H200, 4),
        # ... as far as there are cores ...
        ({**PYTORCH, "gpus": ["0", "1"]}, 4 * GIB, H200, 4),
        ({**PYTORCH, "gpus": ["0"]}, 4 * GIB, Machine(2, H200.gpu_bytes), 1),
        ({**PYTORCH, "gpus": ["0"]}, 4 * GIB, Machine(7, H200.gpu_bytes), 2),
        # ... and memory, of which the entry may have only a share ...
        ({**PYTORCH, "gpus": ["0"]}, 60 * GIB, H200, 2),
        ({**PYTORCH, "gpus": ["0"], "memory_share": 0.25}, 10 * GIB, H200, 2),
        ({**PYTORCH, "gpus": ["0"]}, 4 * GIB, Machine(16, {"0": 24 * GIB}), 2),
        # ... divided by the GPUs of one replica.
        ({**PYTORCH, "gpus": ["0,1"]}, 60 * GIB, H200, 3),
        # What is not known is not bet on.
        ({**PYTORCH, "gpus": ["0"]}, None, H200, 1),
        ({**PYTORCH, "gpus": ["0"]}, 4 * GIB, Machine(16, {}), 1),
        ({**PYTORCH}, 4 * GIB, H200, 1),
    ],
)
def test_the_number_of_replicas(
    fields: dict[str, Any], weights: int | None, machine: Machine, expected: int
) -> None:
    """Of each engine, on each machine."""
    found = entry(**fields)
    assert count_replicas(found, weights, machine, max(1, len(found.gpus))) == expected


@pytest.mark.parametrize(
    ("said", "gpus", "cores", "expected"),
    [
        ("auto", ["0"], 16, 24),
        ("auto", ["0"], 2, 3),
        ("auto", ["0", "1"], 128, 48),
        # An engine on the processor needs the cores itself.
        ("auto", [], 64, 2),
        (5, ["0"], 64, 5),
    ],
)
def test_a_gpu_is_fed_by_all_cores_and_some_more_processes(
    said: Any, gpus: list[str], cores: int, expected: int
) -> None:
    """Unless somebody knows better."""
    serve = (entry(gpus=gpus),)
    assert count_batch_processes(NodeSettings(batch_processes=said), serve, cores) == expected


def test_lmdeploy_is_on_a_gpu_whether_one_is_named_or_not() -> None:
    """A model that was only linked with it names none."""
    assert count_batch_processes(NodeSettings(), (entry(engine="lmdeploy"),), 12) == 18


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"engine": "lmdeploy"}, 256),
        (PYTORCH, 128),
        ({"engine": "transformers"}, 32),
        ({"engine": "lmdeploy", "max_running": 7}, 7),
    ],
)
def test_how_many_requests_run_at_once_suits_the_engine(
    fields: dict[str, Any], expected: int
) -> None:
    """Unless the entry says."""
    assert count_running(entry(**fields)) == expected


def test_replicas_of_one_gpu_divide_the_share_equally() -> None:
    """Four replicas on two GPUs of which they may have 60 percent."""
    found = seats(entry(gpus=["0", "1"], memory_share=0.6), 4)
    assert found == (
        Seat(0, ("0",), 0.3),
        Seat(1, ("1",), 0.3),
        Seat(2, ("0",), 0.3),
        Seat(3, ("1",), 0.3),
    )


def test_one_replica_may_have_two_gpus() -> None:
    """``"0,1"`` is one seat on both."""
    [found] = seats(entry(gpus=["0,1"]), 1)
    assert (found.visible, found.share) == ("0,1", 1.0)


def test_without_gpus_there_is_no_share() -> None:
    """The node does not decide what such a replica sees."""
    assert seats(entry(), 2) == (Seat(0), Seat(1))


@given(
    gpus=st.lists(
        st.lists(st.sampled_from("0123"), min_size=1, max_size=3, unique=True).map(",".join),
        min_size=1,
        max_size=4,
    ),
    replicas=st.integers(1, 12),
    share=st.floats(0.01, 1),
)
def test_seats_never_take_more_than_the_share(gpus: list[str], replicas: int, share: float) -> None:
    """However GPUs are combined, no GPU is promised beyond the entry's share."""
    found = seats(entry(gpus=gpus, memory_share=share), replicas)
    for gpu in "0123":
        assert sum(seat.share or 0 for seat in found if gpu in seat.gpus) <= share + 1e-9


def test_what_is_always_loaded_must_fit() -> None:
    """The refusal names the GPU, the models and what to do."""
    serve = [entry("a", gpus=["0", "1"], memory_share=0.7), entry("b", gpus=["1"])]
    with pytest.raises(ConfigurationError, match=r"GPU 1 .*a \(0.7\), b \(1\) is 1.7.*on_demand"):
        place(serve, {"a": None, "b": None}, H200)


def test_what_could_never_be_loaded_is_refused() -> None:
    """An on-demand model beside one that always takes most of the GPU."""
    serve = [
        entry("a", gpus=["0"], memory_share=0.7),
        entry("b", gpus=["0"], memory_share=0.4, load="on_demand"),
    ]
    with pytest.raises(ConfigurationError, match="b could never be loaded on GPU 0"):
        place(serve, {"a": None, "b": None}, H200)


def test_a_model_named_twice_is_refused() -> None:
    """Its replicas would have the same sockets."""
    with pytest.raises(ConfigurationError, match="names the model 'a' twice"):
        place([entry("a"), entry("a")], {"a": None}, H200)


def test_on_demand_models_may_exceed_the_gpu_together() -> None:
    """That is what they are for."""
    serve = [entry(name, gpus=["0"], load="on_demand") for name in "abc"]
    assert len(place(serve, dict.fromkeys("abc"), H200)) == 3


def test_a_share_without_a_gpu_is_an_error() -> None:
    """It would mean nothing."""
    with pytest.raises(ValueError, match="memory_share needs gpus"):
        entry(memory_share=0.5)
