"""How strongly to compress: the largest model that a method leaves within a budget.

Costs grow with the share that is kept, so the share is found by halving an interval. Every candidate is really cut, and for a
budget of latency really timed: no formula stands between the budget and the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sslim.compress.budgets import UNITS, Budget
from sslim.models import SpeechModel
from sslim.profiling import Conditions, count_macs
from sslim.profiling.latency import measure_whole

HALVINGS = 9  # the share to 1/512 of its range


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search for a strength gave.

    Attributes:
        keep: Share kept.
        model: The model cut that much.
        cost: Its cost, in the budget's unit.
    """

    keep: float
    model: SpeechModel
    cost: float


def model_cost(model: SpeechModel, name: str, conditions: Conditions, *, repeats: int = 15) -> float:
    """Returns what a model costs: parameters without heads, MACs of a second of audio, or measured milliseconds.

    Args:
        model: The model.
        name: ``params``, ``macs`` or ``latency_ms``.
        conditions: Length of the audio, batch and threads that MACs and latency hold for.
        repeats: Rounds of a latency measurement; the median counts.

    Raises:
        ValueError: MACs or latency of a model without a front-end, whose features have no length in seconds.
    """
    if name == "params":
        return float(model.num_parameters(with_heads=False))
    if name == "macs":
        return count_macs(model.config, seconds=conditions.seconds).per_second
    return measure_whole({"model": model.config}, conditions, repeats=repeats)["model"]


def keep_for_budget(
    cut: Callable[[float], SpeechModel],
    budget: Budget,
    cost: Callable[[SpeechModel], float],
    *,
    least: float,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Finds the largest share kept whose model is within a budget.

    Args:
        cut: Share kept, from ``least`` to 1, to model; larger shares never cost less.
        budget: Its maximum counts.
        cost: Model to cost.
        least: Smallest share that the method can keep.
        say: Told every candidate.

    Raises:
        ValueError: Even the smallest model costs more.
    """
    unit = UNITS[budget.name]

    def candidate(keep: float) -> Found:
        model = cut(keep)
        found = Found(keep=keep, model=model, cost=cost(model))
        say(f"keeping {keep:.3f}: {found.cost:,.4g} {unit}")
        return found

    whole = candidate(1.0)
    if whole.cost <= budget.maximum:
        return whole
    best = candidate(least)
    if best.cost > budget.maximum:
        raise ValueError(
            f"the smallest model that this method leaves has {best.cost:,.4g} {unit}, more than the budget of "
            f"{budget.maximum:,.4g}: combine it with another method in a pipeline"
        )
    low, high = least, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = candidate(middle)
        if found.cost <= budget.maximum:
            low, best = middle, found
        else:
            high = middle
    return best
