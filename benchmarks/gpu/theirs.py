"""The rows of raw lmdeploy."""

from __future__ import annotations

from benchmarks.gpu.chats import CHAT_TOKENS
from benchmarks.gpu.raw import Order, RawPipeline, as_strings
from benchmarks.gpu.results import FirstTokens, Load, Throughput
from benchmarks.gpu.session import Session
from benchmarks.gpu.work import WORKS

_LOAD_LIMIT_S = 180.0
_ROW_LIMIT_S = 150.0
_WARM_UP_CHATS = 3


def measure(session: Session, backend: str) -> None:
    """Load raw lmdeploy once and measure every row that has a raw side."""
    assert session.checkpoint is not None
    with (
        session.step(f"{backend}, raw: load"),
        RawPipeline(
            session.checkpoint,
            backend,
            session.gpus[0],
            session.out.with_suffix(f".raw-{backend}.log"),
            session.clock.limit(_LOAD_LIMIT_S),
        ) as pipe,
    ):
        session.results.loads.append(Load(backend, "raw", 1, pipe.load_s))
        session.clock.say(f"{backend}, raw: loaded in {pipe.load_s:.1f} s")
        for row in session.works():
            if session.scale.rows[row].raw:
                _row(session, pipe, backend, row)
        if "chat" in session.rows:
            _chats(session, pipe, backend)


def took_s(session: Session, backend: str) -> float:
    """Seconds that one round takes, judged by what is there of it."""
    results = session.results
    loads = [entry.seconds for entry in results.loads if _is_raw(entry, backend)]
    rows = [entry.seconds for entry in results.throughputs if _is_raw(entry, backend)]
    chats = [sum(entry.seconds) for entry in results.first_tokens if _is_raw(entry, backend)]
    warm_up = 1.4  # the time of it, beside what is timed
    return max(loads, default=0.0) + warm_up * (sum(rows) + sum(chats))


def _is_raw(entry: Load | Throughput | FirstTokens, backend: str) -> bool:
    return entry.side == "raw" and entry.backend == backend


def _row(session: Session, pipe: RawPipeline, backend: str, row: str) -> None:
    sizes, photos = session.scale.rows[row], as_strings(session.photos_of(row))
    one_tile = WORKS[row].detail == "low"
    with session.step(f"{backend}, raw: {row}"):
        # Other pictures than those that are timed.
        pipe.run(
            Order(photos[-sizes.warm_up :], one_tile=one_tile), session.clock.limit(_ROW_LIMIT_S)
        )
        report = pipe.run(
            Order(photos[: sizes.raw], one_tile=one_tile), session.clock.limit(_ROW_LIMIT_S)
        )
        entry = Throughput(
            backend,
            row,
            "raw",
            sizes.raw,
            report.seconds,
            report.prompt_tokens,
            tiles=session.tiles(row),
        )
        session.results.throughputs.append(entry)
        session.clock.say(f"{backend}, raw: {row} {entry.rate:.1f} img/s")


def _chats(session: Session, pipe: RawPipeline, backend: str) -> None:
    photos = as_strings(session.photos_of("448"))
    with session.step(f"{backend}, raw: chat"):
        limit_s = session.clock.limit(_ROW_LIMIT_S)
        pipe.run(Order(photos[-_WARM_UP_CHATS:], CHAT_TOKENS, chat=True), limit_s)
        report = pipe.run(Order(photos[: session.scale.chats], CHAT_TOKENS, chat=True), limit_s)
        session.results.first_tokens.append(
            FirstTokens(backend, "raw", "idle", report.first_token_s)
        )
