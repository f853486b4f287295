"""Micro-batches in the order of the steps, fetched ahead of need."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from sslim.batch import Batch
from sslim.training.protocols import BatchSource


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands in its data: the first micro-batch of the next step."""

    epoch: int = 0
    index: int = 0

    def after(self, micro_batches: int, num_batches: int) -> Position:
        """Position after a step; an epoch's last step is filled from the epoch's beginning, the next starts a new epoch."""
        index = self.index + micro_batches
        return Position(epoch=self.epoch, index=index) if index < num_batches else Position(epoch=self.epoch + 1, index=0)


@dataclass(frozen=True, kw_only=True)
class StepKeys:
    """Keys of the micro-batches that one process takes, step after step; iterating starts over.

    Micro-batch ``j`` of a step goes to process ``j % world_size``, so that two processes do together what one does that
    accumulates twice as many.

    Attributes:
        start: First step's position.
        num_steps: Steps to go.
        accumulate: Micro-batches of a step on each process.
        rank: This process.
        world_size: All processes.
        num_batches: Micro-batches in an epoch.
    """

    start: Position
    num_steps: int
    accumulate: int
    rank: int
    world_size: int
    num_batches: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, each = self.start, self.accumulate * self.world_size
        for _ in range(self.num_steps):
            for j in range(self.rank, each, self.world_size):
                yield position.epoch, (position.index + j) % self.num_batches
            position = position.after(each, self.num_batches)


class _Stop:
    """What the fetching thread puts last: the error that ended it, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _fetch(source: BatchSource, keys: StepKeys, pin: bool, ready: queue.Queue[Any], stopped: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for key in keys:
            batch = source[key]
            ready.put(batch.pin_memory() if pin else batch)
            if stopped.is_set():
                return
    except BaseException as failure:  # handed to the training thread, which raises it
        error = failure
    ready.put(_Stop(error))


def _in_thread(source: BatchSource, keys: StepKeys, pin: bool) -> Iterator[Batch]:
    ready: queue.Queue[Any] = queue.Queue(maxsize=2 * keys.accumulate)
    stopped = threading.Event()
    thread = threading.Thread(target=_fetch, args=(source, keys, pin, ready, stopped), name="sslim-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _Stop):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.01)
            except queue.Empty:
                continue


def micro_batches(source: BatchSource, keys: StepKeys, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yields the micro-batches of ``keys`` in order.

    Args:
        source: Where they come from.
        keys: Which.
        num_workers: Processes that build them; 0 uses one thread of this process, which is enough for stored features.
        pin_memory: For copies to a GPU that overlap with computing.
    """
    if num_workers == 0:
        return _in_thread(source, keys, pin_memory)
    dataset: Any = source  # a map-style dataset whose keys are (epoch, index)
    return iter(DataLoader(dataset, batch_size=None, sampler=keys, num_workers=num_workers, pin_memory=pin_memory))
