"""xtuner's training loop, except that a resumed run does not load again what it has learnt from.

mmengine's loop reads and decodes every earlier batch to skip it, and sleeps two seconds at each
end of an epoch. The samples of an epoch follow from the seed and the epoch's number, so the place
to go on from can be computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import loops
from torch.utils.data import DataLoader
from xtuner.engine.runner import TrainLoop

from shared.process import die_with_parent
from workers.training.randomness import restore


class ResumingTrainLoop(TrainLoop):  # type: ignore[misc]
    """Trains for ``max_epochs``; the first iteration is the one after the last that is saved."""

    resumed_from: Path | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        with _loader_not_started():
            super().__init__(*given, **named)

    def run(self) -> Any:
        """Train to the end, or until a hook ends the process."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        batches = endless(self.dataloader, self._iter)
        if self.resumed_from is not None:
            # After the loader was started: that draws a number, too.
            restore(self.resumed_from)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model


class EndlessBatches:
    """Batches of indices of epoch after epoch, from iteration ``first`` on."""

    def __init__(self, batch_sampler: Any, sampler: Any, first: int) -> None:
        self._batches = batch_sampler
        self._sampler = sampler
        self._first = first

    def __iter__(self) -> Iterator[list[int]]:
        start, passed = divmod(self._first, len(self._batches))
        for epoch in count(start):
            if hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(epoch)
            yield from islice(self._batches, passed, None)
            passed = 0


def endless(loader: DataLoader[Any], first: int) -> Iterator[Any]:
    """The batches of a loader from iteration ``first`` on, without end."""
    batches = EndlessBatches(loader.batch_sampler, loader.sampler, first)
    return iter(
        DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=partial(_init_worker, loader.worker_init_fn),
        )
    )


@contextmanager
def _loader_not_started() -> Iterator[None]:
    """mmengine's loop starts loading when it is made, long before the first iteration."""
    original = loops._InfiniteDataloaderIterator  # noqa: SLF001
    loops._InfiniteDataloaderIterator = _NotStarted  # noqa: SLF001
    try:
        yield
    finally:
        loops._InfiniteDataloaderIterator = original  # noqa: SLF001


class _NotStarted:
    def __init__(self, loader: Any) -> None:
        # Starting a loader draws this number: with it LoRA begins with the weights of a plain run.
        torch.empty((), dtype=torch.int64).random_()


def _init_worker(inner: Callable[[int], None] | None, worker: int) -> None:
    """Loaders die with their trainer, and a request to stop that is sent to its group is not theirs.

    They may not ignore SIGTERM: it is by that signal that a trainer ends them.
    """
    die_with_parent()
    os.setpgid(0, 0)
    if inner is not None:
        inner(worker)
