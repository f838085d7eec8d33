"""lmdeploy used as its documentation shows it: ``pipeline(model)(list of prompts)``.

A process of its own, so that the GPU is free again when it ends. It reads one JSON command per line
and answers each with one line. Loading the files is inside the time, as it is inside vlmq's.

    python -m benchmarks.gpu.raw MODEL_FOLDER turbomind|pytorch
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from benchmarks.gpu.work import NEW_TOKENS, PROMPT, SAMPLING


class RawFailed(AssertionError):
    """Raw lmdeploy did not do what was asked."""


class Order(msgspec.Struct):
    """What the process is to do: answer all pictures at once, or each alone as a chat."""

    paths: list[str]
    new_tokens: int = NEW_TOKENS
    one_tile: bool = False
    chat: bool = False


class Report(msgspec.Struct):
    """What it did. ``first_token_s`` has one entry per chat."""

    seconds: float = 0.0
    prompt_tokens: float = 0.0
    first_token_s: list[float] = []
    error: str = ""


class RawPipeline:
    """The other end: starts the process and gives it orders. Raises: RawFailed, TimeoutError."""

    def __init__(self, model: Path, backend: str, gpu: str, log: Path, limit_s: float) -> None:
        began = time.monotonic()
        with open(log, "ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.raw", str(model), backend],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
            )
        self._log = log
        try:
            self._report(limit_s)
        except BaseException:
            self.close()
            raise
        self.load_s = time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, order: Order, limit_s: float) -> Report:
        """Do one thing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            return self._report(limit_s)
        except BrokenPipeError:
            raise RawFailed("raw lmdeploy has ended") from None
        except TimeoutError:
            self.close()  # a late answer would be taken for the next order's
            raise

    def close(self) -> None:
        """End the process and its children; nothing of them is needed any more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _report(self, limit_s: float) -> Report:
        assert self._process.stdout is not None
        answered, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not answered:
            raise TimeoutError(f"raw lmdeploy gave no answer in {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RawFailed(f"raw lmdeploy ended:\n{self._log.read_text()[-2000:]}")
        report = msgspec.json.decode(line, type=Report)
        if report.error:
            raise RawFailed(report.error)
        return report


# --- in the process -------------------------------------------------------------------------------


def main() -> None:
    """Load the model, then follow orders until there are no more."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever the libraries print must not be taken for an answer.
    os.dup2(2, 1)
    pipe = _load(sys.argv[1], sys.argv[2])
    answers.write(msgspec.json.encode(Report()) + b"\n")
    for line in sys.stdin.buffer:
        answers.write(msgspec.json.encode(_obey(pipe, line)) + b"\n")


def _load(model: str, backend: str) -> Any:
    from lmdeploy import PytorchEngineConfig, pipeline

    # TurboMind is what a plain pipeline picks.
    config = PytorchEngineConfig() if backend == "pytorch" else None
    pipe = pipeline(model, backend_config=config, trust_remote_code=True)
    if pipe.async_engine.backend != backend:
        raise RawFailed(f"lmdeploy chose {pipe.async_engine.backend} instead of {backend}")
    return pipe


def _obey(pipe: Any, line: bytes) -> Report:
    order = msgspec.json.decode(line, type=Order)
    try:
        return _chats(pipe, order) if order.chat else _batch(pipe, order)
    except RawFailed as error:
        return Report(error=str(error))


def _batch(pipe: Any, order: Order) -> Report:
    from lmdeploy.vl import load_image

    start = time.perf_counter()
    prompts = [_prompt(load_image(path), one_tile=order.one_tile) for path in order.paths]
    answers = pipe(prompts, gen_config=_settings(order))
    seconds = time.perf_counter() - start
    if len(answers) != len(order.paths):
        raise RawFailed(f"{len(answers)} answers to {len(order.paths)} prompts")
    for answer in answers:
        if answer.finish_reason == "error" or answer.generate_token_len != order.new_tokens:
            raise RawFailed(
                f"an answer ended '{answer.finish_reason}' after {answer.generate_token_len} "
                f"tokens: {getattr(answer, 'error_message', '')}"
            )
    return Report(seconds, sum(answer.input_token_len for answer in answers) / len(answers))


def _chats(pipe: Any, order: Order) -> Report:
    from lmdeploy.vl import load_image

    times = []
    for path in order.paths:
        first_s = 0.0
        start = time.perf_counter()
        prompt = _prompt(load_image(path), one_tile=order.one_tile)
        for piece in pipe.stream_infer([prompt], gen_config=_settings(order)):
            if piece.text and not first_s:
                first_s = time.perf_counter() - start
        if not first_s:
            raise RawFailed("a stream had no word")
        times.append(first_s)
    return Report(sum(times), first_token_s=times)


def _prompt(image: Any, *, one_tile: bool) -> Any:
    if not one_tile:
        return (PROMPT, image)
    picture = {"data": image, "max_dynamic_patch": 1}
    content = [
        {"type": "text", "text": PROMPT},
        {"type": "image_data", "image_data": picture},
    ]
    return [{"role": "user", "content": content}]


def _settings(order: Order) -> Any:
    from lmdeploy import GenerationConfig

    return GenerationConfig(
        max_new_tokens=order.new_tokens,
        min_new_tokens=order.new_tokens,
        do_sample=True,
        **SAMPLING,
    )


def as_strings(paths: Sequence[Path]) -> list[str]:
    """Paths as an order holds them."""
    return [str(path) for path in paths]


if __name__ == "__main__":
    main()
