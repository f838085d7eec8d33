"""Many streams at once through one api process: do they all arrive whole, and when do they begin.

The load comes from a process of its own (``stream_load``). The engine waits between tokens, so
that all streams are open together.
"""

from __future__ import annotations

import subprocess
import sys

import msgspec

from benchmarks.nodes import echo_node
from benchmarks.report import Figure, Target, milliseconds, percentile
from benchmarks.scale import Scale
from benchmarks.stream_load import Outcome

_TOKENS = 20
_TOKEN_DELAY_S = 0.1
_LIMIT_S = 300.0


def measure(scale: Scale) -> list[Figure]:
    """Run the load and read what became of it."""
    with echo_node(token_delay_s=_TOKEN_DELAY_S) as node:
        _load(node.base_url, streams=8, rounds=1)
        outcome = _load(node.base_url, streams=scale.streams, rounds=scale.stream_rounds)
    total = scale.streams * scale.stream_rounds
    delay = f"the engine's own {milliseconds(_TOKEN_DELAY_S):.0f} ms included"
    figures = [
        Figure("streams", "open at once", outcome.most_open, "", Target(">=", scale.streams)),
        Figure(
            "streams",
            "failures",
            len(outcome.failures),
            "",
            Target("<=", 0),
            "; ".join(sorted(set(outcome.failures))[:3]) or f"of {total}",
        ),
    ]
    if not outcome.first_delta_s:
        return figures
    return figures + [
        Figure(
            "streams",
            f"first delta, p{percent}",
            milliseconds(percentile(outcome.first_delta_s, percent)),
            "ms",
            None,
            delay,
        )
        for percent in (50, 99)
    ]


def _load(base_url: str, *, streams: int, rounds: int) -> Outcome:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.stream_load"),
            *(base_url, str(streams), str(rounds), str(_TOKENS)),
        ],
        check=True,
        stdout=subprocess.PIPE,
        timeout=_LIMIT_S,
    )
    return msgspec.json.decode(finished.stdout, type=Outcome)
