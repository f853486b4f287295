"""Timing in turns: each round runs everything once, in a new random order.

A drift of the machine's clock or load then meets all rivals alike, and nothing finds its weights in cache because the same
thing ran just before. A time means something beside the others of its round, and little beside those of another run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


def times_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str,
    repeats: int,
    least_s: float = 0.0,
    warm_ups: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each call in each round, in the order of the rounds, so that equal places can be compared.

    Args:
        calls: Name to what is timed; it runs in inference mode.
        device: ``cpu`` or ``cuda``; a GPU is waited for before and after each call.
        repeats: Rounds that count.
        least_s: More rounds follow while all of them together have taken less than this.
        warm_ups: Rounds before them, which do not.
        seed: Decides the orders.
        clock: Monotonic seconds.
    """
    rng, names = random.Random(seed), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    with torch.inference_mode():
        began, turn = clock(), 0
        while turn < warm_ups + repeats or clock() - began < least_s:
            rng.shuffle(names)
            for name in names:
                synchronize()
                start = clock()
                calls[name]()
                synchronize()
                if turn >= warm_ups:
                    times[name].append(1000 * (clock() - start))
            turn += 1
    return {name: times[name] for name in calls}


@contextmanager
def using_threads(num_threads: int) -> Iterator[None]:
    """Sets the number of torch's threads, and puts it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
